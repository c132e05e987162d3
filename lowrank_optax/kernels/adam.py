"""What implementations of `low_bit_adam` share: Adam's arithmetic, its scalars, and operands."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.quantization import BlockFormat, layout_of, packing_of


class AdamScalars(NamedTuple):
    """Scalars of one Adam step: float32 scalars or Python numbers, which may all be traced.

    Attributes:
      learning_rate: Factor of the whole change of a parameter; not used without a parameter.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Constant added to the root of the bias-corrected second moment.
      weight_decay: Factor of the parameter that is added to the update.
      correction1: Bias correction ``1 - b1**t`` at step ``t = 1, 2, …``.
      correction2: Bias correction ``1 - b2**t``.
      scale: Factor of the update, not of the decay.
    """

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any
    weight_decay: Any
    correction1: Any
    correction2: Any
    scale: Any = 1.0


def as_float32(scalars: AdamScalars) -> AdamScalars:
    """The scalars as float32 arrays."""
    return AdamScalars(*(jnp.asarray(x, jnp.float32) for x in scalars))


def adam_moments(
    gradient: jax.Array, first: jax.Array, second: jax.Array, s: AdamScalars
) -> tuple[jax.Array, jax.Array]:
    """Both moments after a float32 gradient."""
    first = s.b1 * first + (1 - s.b1) * gradient
    second = s.b2 * second + (1 - s.b2) * jnp.square(gradient)
    return first, second


def adam_direction(first: jax.Array, second: jax.Array, s: AdamScalars) -> jax.Array:
    """Adam's update before sign and learning rate, from both new moments."""
    return s.scale * (first / s.correction1) / (jnp.sqrt(second / s.correction2) + s.eps)


def applied(direction: jax.Array, param: jax.Array, s: AdamScalars) -> jax.Array:
    """The new parameter, in its dtype: decayed and moved in float32, and rounded once."""
    old = param.astype(jnp.float32)
    return (old - s.learning_rate * (direction + s.weight_decay * old)).astype(param.dtype)


def result_like(x: jax.Array, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """A kernel's result with the shape of an operand; inside `jax.shard_map` it varies like it."""
    varies = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, manual_axis_type=varies)


def in_place(values: Sequence[Any], result: Any, states: Sequence[Any]) -> dict[int, int]:
    """Aliases of a kernel: which operand each of its results is written over.

    Operands are the scalars, the values (a gradient, and a parameter if there is one) and the
    states; results are the parameter or update, and the states. An update takes the memory of a
    gradient of its dtype, which few need afterwards.
    """
    last = len(values)  # operand 0 is the scalars
    aliases = {last: 0} if values[-1].dtype == result.dtype else {}
    return aliases | {last + 1 + i: 1 + i for i in range(len(states))}


def reason_against_formats(formats: tuple[BlockFormat, BlockFormat]) -> str | None:
    """Why no kernel supports moments in these codes, or None."""
    first, second = formats
    if first.block_size != second.block_size:
        return "both moments must have the same block size"
    if first.map.bits != second.map.bits:
        return "both moments must have the same number of bits"
    if any(jnp.dtype(fmt.scale_dtype) != jnp.float32 for fmt in formats):
        return "scales must be float32"
    return None


def coded_shapes(
    shape: tuple[int, ...], fmt: BlockFormat
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and scales of an array, for ``packing="rows"``."""
    layout, codes = layout_of(shape, fmt.block_size), list(shape)
    if fmt.map.bits == 4:
        axis = packing_of(shape).axis
        codes[axis] = -(-codes[axis] // 2)
    return tuple(codes), (*layout.leading, layout.blocks)
