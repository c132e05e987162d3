"""Pruning by magnitude: masks of the largest weights, and optimizers that keep to a mask."""

from collections.abc import Callable
import math
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from lowrank_optax.layers.powerpropagation.reparameterisation import (
    Where,
    layer_matrices,
    selected,
)
from lowrank_optax.matrices import (
    DimensionNumbersRule,
    WeightDimensionNumbers,
    explicit_sharding,
    from_matrix,
    to_matrix,
)
from lowrank_optax.matrices.paths import normalised_path, path_string
from lowrank_optax.states.arguments import transformation

Scope: TypeAlias = Literal["layer", "global"]


def magnitude_masks(
    params: Any,
    keep: float,
    scope: Scope = "layer",
    where: Where = None,
    output: Where = None,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> Any:
    """Compute masks that are True for the largest weights in absolute value.

    The weights and the trained parameters of Powerpropagation have the same order, so the masks of
    both are the same. Of equal weights, the first ones are kept.

    Args:
      params: Tree of arrays.
      keep: Share of the weights to keep, in (0, 1]: of ``n``, ``keep * n`` rounded down, at least
        1. It fixes shapes, so it must be a Python number.
      scope: ``"layer"``: that share of each layer; layers stacked in one leaf are pruned one by one
        if the leaf is known to be a batch of matrices. ``"global"``: that share of all selected
        leaves together, but at least one weight of each leaf.
      where: Leaves to prune, as for `powerprop`.
      output: Those of them that are the output layer, given as ``where`` is: they keep twice the
        share, at most all, as in the official code.
      weight_dimension_numbers: How leaves are batches of matrices, as for `scale_by_projection`;
        None for the rule by names.

    Returns:
      A tree like ``params`` of bool arrays, ``optax.MaskedNode`` for leaves that are not pruned.

    Raises:
      ValueError: If ``keep`` is not in (0, 1], ``scope`` is unknown, or ``output`` is given with
        the scope ``"global"``.
      TypeError: If ``keep`` is not a Python number.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.array([[0.1, -3.0], [2.0, 0.5]]), "bias": jnp.ones(2)}
      >>> masks = lro.layers.magnitude_masks(params, keep=0.5)
      >>> print(masks["kernel"].tolist(), masks["bias"])
      [[False, True], [True, False]] MaskedNode()

    Reference:
      The one-shot protocol of the official notebook,
      https://github.com/google-deepmind/deepmind-research/tree/master/powerpropagation.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"keep={keep!r} must be a Python number: it fixes how many are kept.")
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep!r} must be the share of weights to keep, in (0, 1].")
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r} must be 'layer' or 'global'.")
    if scope == "global" and output is not None:
        raise ValueError(
            f"output={output!r} is for scope='layer': 'global' has no shares by layer."
        )
    leaves, treedef = jax.tree.flatten(params)
    chosen = selected(params, where, weight_dimension_numbers)
    if scope == "global":
        masks = iter(_global_masks([x for x, c in zip(leaves, chosen, strict=True) if c], keep))
        return treedef.unflatten([next(masks) if c else optax.MaskedNode() for c in chosen])
    is_output = [False] * len(leaves) if output is None else selected(params, output)
    specs = layer_matrices(params, weight_dimension_numbers)

    def mask_of(x: jax.Array, is_chosen: bool, is_output: bool, spec: Any) -> Any:
        if not is_chosen:
            return optax.MaskedNode()
        share = min(1.0, 2 * keep) if is_output else keep
        mask = lambda layers: largest(jnp.abs(layers), _count(share, layers.shape[-1]))
        return by_layer(mask, spec, x) if x.size else jnp.ones(x.shape, bool)

    return treedef.unflatten(map(mask_of, leaves, chosen, is_output, specs))


def _global_masks(leaves: list[jax.Array], keep: float) -> list[jax.Array]:
    sizes = [jnp.abs(_gathered(x)).ravel().astype(jnp.float32) for x in leaves]
    # The largest of each leaf comes before all others, so each leaf keeps a weight.
    sizes = [x.at[jnp.argmax(x)].set(jnp.inf) if x.size else x for x in sizes]
    together = jnp.concatenate(sizes) if sizes else jnp.zeros(0)
    least = sum(x.size > 0 for x in sizes)
    mask = largest(together, max(least, _count(keep, together.size)))
    masks = []
    for x in leaves:
        own = mask[: x.size].reshape(x.shape)
        masks.append(explicit_sharding.constrain(own, explicit_sharding.partition_of(x)))
        mask = mask[x.size :]
    return masks


def _count(keep: float, size: int) -> int:
    return max(1, int(keep * size + 1e-6))  # 0.29 * 100 is 28.999999999999996


def largest(sizes: jax.Array, count: Any) -> jax.Array:
    """Masks of the ``count`` largest along the last axis; of equal ones, the first.

    Args:
      sizes: Numbers ``[..., n]``.
      count: An int, or an integer array ``[...]``, which may be traced.
    """
    order = jnp.argsort(sizes, axis=-1, stable=True, descending=True)
    is_first = jnp.arange(sizes.shape[-1]) < jnp.asarray(count)[..., None]
    is_first = jnp.broadcast_to(is_first, sizes.shape)
    return jnp.put_along_axis(jnp.zeros(sizes.shape, bool), order, is_first, axis=-1, inplace=False)


def by_layer(
    function: Callable[..., jax.Array], spec: WeightDimensionNumbers | None, *arrays: jax.Array
) -> jax.Array:
    """``function`` of arrays of one shape, viewed as ``[layers, weights of one]``, in that shape.

    An array that is not a batch of matrices is one layer. On an explicit mesh each layer is
    gathered, since a rank among its weights needs all of them.
    """
    gathered = [_gathered(x) for x in arrays]
    matrices = gathered if spec is None else [to_matrix(x, spec) for x in gathered]
    shape = matrices[0].shape
    layers = 1 if spec is None else math.prod(shape[:-2])
    result = function(*(x.reshape(layers, x.size // layers) for x in matrices)).reshape(shape)
    if spec is not None:
        result = from_matrix(result, spec, gathered[0])
    return explicit_sharding.constrain(result, explicit_sharding.partition_of(arrays[0]))


def _gathered(x: jax.Array) -> jax.Array:
    partition = explicit_sharding.partition_of(x)
    return explicit_sharding.constrain(x, partition and PartitionSpec(*[None] * x.ndim))


def apply_masks(params: Any, masks: Any) -> Any:
    """Return the parameters with exact zeros where a mask is False, also if they are not finite.

    Gradients through it are masked too.

    Args:
      params: Tree of arrays.
      masks: Tree like it of bool arrays, ``optax.MaskedNode`` or None where there is no mask, as
        `magnitude_masks` returns.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.array([[0.1, -3.0]])}
      >>> pruned = lro.layers.apply_masks(params, lro.layers.magnitude_masks(params, keep=0.5))
      >>> print(pruned["kernel"].tolist())
      [[0.0, -3.0]]

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296.
    """

    def masked(x: jax.Array, mask: Any) -> jax.Array:
        no_mask = mask is None or isinstance(mask, optax.MaskedNode)
        return x if no_mask else jnp.where(mask, x, jnp.zeros((), x.dtype))

    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(map(masked, leaves, treedef.flatten_up_to(masks)))


class MaskUpdatesState(NamedTuple):
    """State of `mask_updates`.

    Attributes:
      mask: Tree like the parameters of bool arrays, ``MaskedNode`` where there is no mask.
      inner_state: State of the inner optimizer.
    """

    mask: Any
    inner_state: optax.OptState


def mask_updates(
    inner: optax.GradientTransformation, masks: Any | Callable[[optax.Params], Any]
) -> optax.GradientTransformationExtraArgs:
    """Run ``inner`` without updates where a mask is False: pruned weights stay zero.

    Both the gradients that ``inner`` gets and the updates that it returns are masked, so neither
    momentum nor weight decay moves a pruned weight.

    Args:
      inner: Any optax transformation, with its learning rate and weight decay.
      masks: Tree like the parameters of bool arrays, or a function from the parameters to one,
        called in ``init``. A leaf without a mask may be ``MaskedNode``, None or absent. The masks
        are part of the state.

    Returns:
      A transformation with the state `MaskUpdatesState`.

    Raises:
      ValueError: In ``init``, if a mask has another shape than its parameter, or no parameter.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = {"kernel": jnp.array([[0.0, -3.0]])}
      >>> tx = lro.layers.mask_updates(optax.sgd(0.5), {"kernel": params["kernel"] != 0})
      >>> updates, _ = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
      >>> print(updates["kernel"])
      [[ 0.  -0.5]]

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296: masked training.
    """
    inner = transformation("inner", inner)

    def init_fn(params: optax.Params) -> MaskUpdatesState:
        given = jax.tree_util.tree_leaves_with_path(masks(params) if callable(masks) else masks)
        by_path = {normalised_path(path): mask for path, mask in given}

        def mask_of(path: Any, leaf: Any) -> Any:
            mask = by_path.pop(normalised_path(path), None)
            if mask is None:
                return optax.MaskedNode()
            if mask.shape != leaf.shape:
                raise ValueError(
                    f"the mask of {path_string(path)!r} has the shape {mask.shape}, its parameter "
                    f"{leaf.shape}."
                )
            return jnp.array(mask, bool)  # a copy, which a step may donate

        mask = jax.tree_util.tree_map_with_path(mask_of, params)
        if by_path:
            name = "/".join(next(iter(by_path)))
            raise ValueError(f"masks has {name!r}, which is not a parameter.")
        return MaskUpdatesState(mask, inner.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MaskUpdatesState]:
        masked = apply_masks(updates, state.mask)
        new, inner_state = inner.update(masked, state.inner_state, params, **extra_args)
        return apply_masks(new, state.mask), MaskUpdatesState(state.mask, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
