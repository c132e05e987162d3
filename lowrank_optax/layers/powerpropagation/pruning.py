"""Pruning by magnitude: masks of the largest weights."""

from collections.abc import Callable
import math
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from lowrank_optax.layers.powerpropagation.where import Where, layer_matrices, selected
from lowrank_optax.matrices import (
    DimensionNumbersRule,
    WeightDimensionNumbers,
    explicit_sharding,
    from_matrix,
    to_matrix,
)

Scope: TypeAlias = Literal["layer", "global"]


def magnitude_masks(
    params: Any,
    keep: float,
    scope: Scope = "layer",
    where: Where = None,
    output: Where = None,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> Any:
    """Masks of the largest weights in size: True for those to keep.

    Weights and what Powerpropagation trains rank alike, so the masks of either are the same. Of
    equal sizes the first ones are kept.

    Args:
      params: Any tree of arrays.
      keep: The share of the weights to keep, in (0, 1]: of ``n``, ``keep * n`` rounded down, at
        least 1. It fixes shapes, so it must be a Python number.
      scope: ``"layer"``: that share of each layer; layers stacked in one leaf are pruned each on
        its own where they are known to be a batch of matrices. ``"global"``: of all selected
        leaves together, though at least one weight of each leaf.
      where: Which leaves, as for `powerprop`.
      output: The leaves of these that are the output layer, given as ``where`` is: they keep twice
        the share, at most all, as in the official code. None for no such.
      weight_dimension_numbers: How leaves are batches of matrices, as `scale_by_projection` takes
        it; None for the rule by names.

    Returns:
      A tree like ``params`` of bool arrays, ``optax.MaskedNode`` where a leaf is not pruned.

    Raises:
      ValueError: If ``keep`` is not in (0, 1], ``scope`` unknown, or ``output`` given for the scope
        ``"global"``.
      TypeError: If ``keep`` is no Python number.

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
    _check_share(keep)
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
    doubled = [False] * len(leaves) if output is None else selected(params, output)
    specs = layer_matrices(params, weight_dimension_numbers)
    return treedef.unflatten(
        [
            _layer_mask(x, min(1.0, 2 * keep) if twice else keep, spec) if c else optax.MaskedNode()
            for x, c, twice, spec in zip(leaves, chosen, doubled, specs, strict=True)
        ]
    )


def apply_masks(params: Any, masks: Any) -> Any:
    """The parameters with zeros where a mask is False.

    Gradients through it are masked too. Exact zeros, also where a weight is not finite.

    Args:
      params: Any tree of arrays.
      masks: A tree like it of bool arrays, ``optax.MaskedNode`` or None where there is no mask, as
        `magnitude_masks` gives.

    Returns:
      A tree like ``params``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.array([[0.1, -3.0]])}
      >>> pruned = lro.layers.apply_masks(params, lro.layers.magnitude_masks(params, keep=0.5))
      >>> print(pruned["kernel"].tolist())
      [[0.0, -3.0]]

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296.
    """
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaves, treedef.flatten_up_to(masks), strict=True)
    return treedef.unflatten([_masked(x, mask) for x, mask in pairs])


def largest(sizes: jax.Array, count: Any) -> jax.Array:
    """Masks of the ``count`` largest along the last axis; of equals, the first.

    Args:
      sizes: Numbers ``[..., n]``.
      count: An int, or an integer array ``[...]``, which may be traced.
    """
    order = jnp.argsort(sizes, axis=-1, stable=True, descending=True)
    is_first = jnp.arange(sizes.shape[-1]) < jnp.asarray(count)[..., None]
    is_first = jnp.broadcast_to(is_first, sizes.shape)
    return jnp.put_along_axis(jnp.zeros(sizes.shape, bool), order, is_first, axis=-1, inplace=False)


def by_layer(x: jax.Array, spec: WeightDimensionNumbers | None) -> jax.Array:
    """A leaf as ``[layers, weights of one]``; as a single layer if it is no batch of matrices."""
    if spec is None:
        return x.reshape(1, -1)
    matrix = to_matrix(x, spec)
    return matrix.reshape(math.prod(matrix.shape[:-2]), math.prod(matrix.shape[-2:]))


def from_layers(
    layers: jax.Array, spec: WeightDimensionNumbers | None, like: jax.Array
) -> jax.Array:
    """The inverse of `by_layer`: an array of ``like``'s shape."""
    if spec is None:
        return layers.reshape(like.shape)
    return from_matrix(layers.reshape(to_matrix(like, spec).shape), spec, like)


def gathered(function: Callable[..., jax.Array], x: jax.Array, *others: jax.Array) -> jax.Array:
    """An array like ``x`` from whole ones: on an explicit mesh, a rank needs all of a layer."""
    result = function(_whole(x), *map(_whole, others))
    return explicit_sharding.constrain(result, explicit_sharding.partition_of(x))


def _whole(x: jax.Array) -> jax.Array:
    partition = explicit_sharding.partition_of(x)
    whole = None if partition is None else PartitionSpec(*[None] * x.ndim)
    return explicit_sharding.constrain(x, whole)


def _layer_mask(x: jax.Array, keep: float, spec: WeightDimensionNumbers | None) -> jax.Array:
    def mask(x: jax.Array) -> jax.Array:
        sizes = jnp.abs(by_layer(x, spec))
        return from_layers(largest(sizes, _count(keep, sizes.shape[-1])), spec, x)

    return gathered(mask, x) if x.size else jnp.ones(x.shape, bool)


def _global_masks(leaves: list[jax.Array], keep: float) -> list[jax.Array]:
    sizes = [jnp.abs(_whole(x)).ravel().astype(jnp.float32) for x in leaves]
    # The largest of each leaf comes before all others: no leaf is left without a weight.
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
    # With a hair: 0.29 · 100 is 28.999999999999996, which is 29.
    return max(1, int(keep * size + 1e-6))


def _check_share(keep: Any) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"keep={keep!r} must be a Python number: it fixes how many are kept.")
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep!r} must be the share of weights to keep, in (0, 1].")


def _masked(x: jax.Array, mask: Any) -> jax.Array:
    no_mask = mask is None or isinstance(mask, optax.MaskedNode)
    return x if no_mask else jnp.where(mask, x, jnp.zeros((), x.dtype))
