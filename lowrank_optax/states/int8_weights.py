"""Weights in 8 bits between steps, updated with stochastic rounding, as Q-GaLore trains them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices.paths import is_whole, leaves_by_path, path_string
from lowrank_optax.quantization import Affine, BlockFormat, code_map, dequantize, quantize
from lowrank_optax.slices.call import Whole, keys_of_rows, whole_of
from lowrank_optax.slices.update import update_in_slices
from lowrank_optax.states.precision import in_float32

INT8 = BlockFormat(code_map("affine", 8), 256)


class Int8Weight(NamedTuple):
    """A weight in codes, in its place in the tree of parameters: ``scales · (codes - zeros)``.

    Attributes:
      codes: uint8 in the weight's shape.
      scales: float32 ``[*leading, groups]``, one for each group of 256 consecutive elements.
      zeros: uint8 ``[*leading, groups]``, the code of zero.
    """

    codes: Any
    scales: Any
    zeros: Any


class Int8WeightsState(NamedTuple):
    """State of `update_int8_weights`.

    Attributes:
      count: Number of updates so far, int32.
      inner: State of the inner transformation, for the weights as floats.
    """

    count: jax.typing.ArrayLike
    inner: optax.OptState


def to_int8_weights(
    params: optax.Params,
    which: Callable[[str, jax.Array], bool] | None = None,
    min_size: int = 4096,
) -> Any:
    """Parameters with an `Int8Weight` in the place of each that is chosen.

    Args:
      params: The parameters.
      which: ``which(path, array)``: whether it is stored so; if None, arrays of floats with at
        least two axes and ``min_size`` elements, embeddings included.
      min_size: Smaller ones stay, whatever ``which`` says.

    Raises:
      ValueError: If none is chosen.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.to_int8_weights({"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)})
      >>> print(params["kernel"].codes.dtype, params["kernel"].scales.shape, params["bias"].dtype)
      uint8 (16,) float32

    Reference:
      Zhang et al., Q-GaLore, 2024, https://arxiv.org/abs/2407.08296, section 3.3.
    """

    def chosen(path: Any, x: jax.Array) -> bool:
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 1 or x.size < max(1, min_size):
            return False
        return x.ndim > 1 if which is None else which(path_string(path), x)

    leaves = jax.tree_util.tree_leaves_with_path(params)
    if is_whole(params) and not any(chosen(*leaf) for leaf in leaves):
        size, name = max((x.size, path_string(path)) for path, x in leaves)
        raise ValueError(
            f"no parameter is chosen: the largest, {name!r}, has {size} elements, and min_size is "
            f"{min_size}; which={which!r}."
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, x: Int8Weight(*quantize(x, INT8)) if chosen(path, x) else x, params
    )


def from_int8_weights(params: Any, dtype: Any = jnp.float32) -> optax.Params:
    """The parameters as floats: what a model is called with, and gradients are taken of.

    Args:
      params: What `to_int8_weights` made.
      dtype: Of the weights that were in codes.
    """

    def whole(x: Any) -> Any:
        if not isinstance(x, Int8Weight):
            return x
        return dequantize(Affine(*x), INT8, x.codes.shape).astype(dtype)

    return jax.tree.map(whole, params, is_leaf=_is_int8)


def update_int8_weights(
    inner: optax.GradientTransformation, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` on weights in 8 bits, which are rounded at random.

    At each step the weights are decoded, ``inner`` updates them in float32, and the sum is encoded
    with new scales, each element up or down at random with itself as expectation. The gradients
    given are those of the decoded weights, `from_int8_weights`. Updates are such that
    ``optax.apply_updates`` replaces codes and scales by the new ones (codes are added modulo 256).

    A weight takes 1.02 bytes for each element, where float32 takes four.

    Args:
      inner: Any optax transformation.
      seed: Of the random numbers; the number of the step and the place of a leaf are folded in.

    Returns:
      A transformation that needs ``params``, with the state `Int8WeightsState`.

    Raises:
      ValueError: In ``init``, if no parameter is an `Int8Weight`; in ``update``, without
        ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> target = jnp.linspace(-1.0, 1.0, 4096).reshape(64, 64)
      >>> loss = lambda p: jnp.sum((p["kernel"] - target) ** 2)
      >>> tx = lro.update_int8_weights(optax.adam(optax.linear_schedule(0.05, 0.0, 100)))
      >>> params = lro.to_int8_weights({"kernel": jnp.zeros((64, 64))})
      >>> def step(carry, _):
      ...     params, state = carry
      ...     gradient = jax.grad(loss)(lro.from_int8_weights(params))
      ...     updates, state = tx.update(gradient, state, params)
      ...     return (optax.apply_updates(params, updates), state), None
      >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=100)
      >>> print(f"{loss(lro.from_int8_weights(params)):.2f}")
      0.05

    Reference:
      Zhang et al., Q-GaLore, 2024, https://arxiv.org/abs/2407.08296, section 3.3.
    """
    wide = in_float32(inner)

    def init_fn(params: Any) -> Int8WeightsState:
        leaves = jax.tree.leaves(params, is_leaf=_is_int8)
        if is_whole(params) and not any(map(_is_int8, leaves)):
            raise ValueError("params has no Int8Weight: pass lro.to_int8_weights(params).")
        return Int8WeightsState(jnp.zeros([], jnp.int32), wide.init(from_int8_weights(params)))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        whole: Whole | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Int8WeightsState]:
        if params is None:
            raise ValueError(
                "update_int8_weights needs params: call tx.update(grads, state, params)."
            )
        full = from_int8_weights(params)
        if whole is not None:
            tree = jax.eval_shape(from_int8_weights, whole_of(whole, params))
            extra_args["whole"] = whole._replace(tree=tree)
        changes, inner_state = wide.update(updates, state.inner, full, **extra_args)
        olds, treedef = jax.tree.flatten(params, is_leaf=_is_int8)
        paths = leaves_by_path(updates)
        rows = zip(
            paths, olds, treedef.flatten_up_to(full), treedef.flatten_up_to(changes), strict=True
        )
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        new = [
            _change(old, new := weight + change, keys_of_rows(key, path, new, whole))
            if _is_int8(old)
            else change
            for path, old, weight, change in rows
        ]
        return treedef.unflatten(new), Int8WeightsState(
            optax.safe_increment(state.count), inner_state
        )

    core = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    in_codes = lambda call: list(map(_is_int8, call.params))
    return core._replace(update=update_in_slices(core, in_codes, [inner]))


def _change(old: Int8Weight, weight: jax.Array, key: jax.Array) -> Int8Weight:
    """What makes of the old codes those of the weight, by additions."""
    new = quantize(weight, INT8, key)
    return Int8Weight(*(after - before for after, before in zip(new, old, strict=True)))


def _is_int8(x: Any) -> bool:
    return isinstance(x, Int8Weight)
