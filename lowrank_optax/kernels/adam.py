"""Adam's arithmetic, element by element: the same lines in every kernel and every reference."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class AdamScalars(NamedTuple):
    """What an Adam step is told each time: float32 scalars, or Python numbers; all may be traced.

    Attributes:
      learning_rate: Of the whole change of a parameter. Not used where there is no parameter.
      b1: Decay of the first moment.
      b2: Decay of the second.
      eps: Added to the root of the second moment, its bias corrected.
      weight_decay: Times the parameter, added to the update.
      correction1: ``1 - b1**t`` at step ``t = 1, 2, …``.
      correction2: ``1 - b2**t``.
      scale: Times the update, not the decay.
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


def as_vector(scalars: AdamScalars) -> jax.Array:
    """The scalars as float32 ``[8]``: one operand of a kernel."""
    return jnp.stack(as_float32(scalars))


def from_vector(vector: Any) -> AdamScalars:
    """The scalars read from that operand."""
    return AdamScalars(*(vector[i] for i in range(len(AdamScalars._fields))))


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
    """A kernel's result in the shape of an operand; inside `jax.shard_map` it varies as that."""
    varies = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, manual_axis_type=varies)


def in_place(
    values: Sequence[Any], result: Any, states: Sequence[Any], between: int = 0
) -> dict[int, int]:
    """Which operands of a kernel its results are written over.

    Operands are the scalars, the values (a gradient, and a parameter if there is one), so many
    ``between``, and the states; results are the first and the states. Without a parameter the
    update may take the memory of a gradient of its dtype, which few need afterwards.
    """
    last = len(values)  # operand 0 is the scalars
    aliases = {last: 0} if values[-1].dtype == result.dtype else {}
    return aliases | {last + between + 1 + i: 1 + i for i in range(len(states))}
