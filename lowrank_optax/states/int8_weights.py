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
    """A weight in codes, as a leaf of the parameters: ``scales · (codes - zeros)``.

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
    """Parameters with an `Int8Weight` instead of each chosen array.

    Args:
      params: Parameters.
      which: ``which(path, array)`` says whether an array is stored in 8 bits; None chooses arrays
        of floats with at least two axes, embeddings included.
      min_size: Arrays with fewer elements stay, whatever ``which`` says.

    Raises:
      ValueError: If no array is chosen.

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
    """The parameters as floats, to call a model with and to take gradients of.

    Args:
      params: Parameters from `to_int8_weights`.
      dtype: Dtype of the weights that were in codes.
    """
    decode = lambda x: dequantize(Affine(*x), INT8, x.codes.shape).astype(dtype)
    return jax.tree.map(lambda x: decode(x) if _is_int8(x) else x, params, is_leaf=_is_int8)


def update_int8_weights(
    inner: optax.GradientTransformation, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Run ``inner`` on weights in 8 bits, with stochastic rounding.

    At each step the weights are decoded, ``inner`` updates them in float32, and the sum is encoded
    with new scales, each element rounded up or down at random with itself as expectation. Give it
    the gradients of the decoded weights, `from_int8_weights`. ``optax.apply_updates`` then replaces
    codes and scales by the new ones (codes are added modulo 256).

    A weight takes 1.02 bytes for each element, where float32 takes four.

    Args:
      inner: Any optax transformation.
      seed: Seed of the random numbers, combined with the step and the path of a leaf.

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
    in_32_bits = in_float32(inner)

    def init_fn(params: Any) -> Int8WeightsState:
        leaves = jax.tree.leaves(params, is_leaf=_is_int8)
        if is_whole(params) and not any(map(_is_int8, leaves)):
            raise ValueError("params has no Int8Weight: pass lro.to_int8_weights(params).")
        state = in_32_bits.init(from_int8_weights(params))
        return Int8WeightsState(jnp.zeros([], jnp.int32), state)

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
        changes, inner_state = in_32_bits.update(updates, state.inner, full, **extra_args)
        olds, treedef = jax.tree.flatten(params, is_leaf=_is_int8)
        paths = leaves_by_path(updates)
        rows = zip(
            paths, olds, treedef.flatten_up_to(full), treedef.flatten_up_to(changes), strict=True
        )
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        new = []
        for path, old, weight, change in rows:
            if _is_int8(old):
                after = quantize(weight + change, INT8, keys_of_rows(key, path, weight, whole))
                change = Int8Weight(*(a - b for a, b in zip(after, old, strict=True)))
            new.append(change)
        count = optax.safe_increment(state.count)
        return treedef.unflatten(new), Int8WeightsState(count, inner_state)

    core = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    in_codes = lambda call: list(map(_is_int8, call.params))
    return core._replace(update=update_in_slices(core, in_codes, [inner]))


def _is_int8(x: Any) -> bool:
    return isinstance(x, Int8Weight)
