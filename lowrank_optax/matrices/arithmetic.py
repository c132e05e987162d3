"""Products, sums and branches as compilers do them best."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.matrices.explicit_sharding import product


def summed_together(arrays: tuple[jax.Array, ...], axis: int) -> tuple[jax.Array, ...]:
    """The sums of arrays of one shape along an axis, each in its own dtype.

    A compiler makes one pass for each of several sums, and XLA for CPU writes the operand of a
    single one to memory. Counts are best in int32, which it sums in vectors.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, -2.0, 3.0]])
      >>> [total.item() for total in summed_together((x, (x > 0).astype(jnp.int32)), 1)]
      [2.0, 2]
    """
    add = lambda xs, ys: tuple(x + y for x, y in zip(xs, ys, strict=True))
    zeros = tuple(jnp.zeros([], x.dtype) for x in arrays)
    return tuple(jax.lax.reduce(arrays, zeros, add, (axis,)))


T = TypeVar("T")


def branch(predicate: jax.Array, on_true: Callable[[], T], on_false: Callable[[], T]) -> T:
    """``jax.lax.cond``; outside of a trace, where that would be compiled at each call, an ``if``.

    Args:
      predicate: A bool scalar.
      on_true: What is computed if it is true.
      on_false: What is computed otherwise, with results of the same types.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> pick = lambda x: branch(x > 0, lambda: x, lambda: -x)
      >>> print(pick(jnp.array(-2.0)), jax.jit(pick)(jnp.array(-2.0)))
      2.0 2.0
    """
    if isinstance(predicate, jax.core.Tracer):
        return jax.lax.cond(predicate, on_true, on_false)
    return on_true() if predicate else on_false()


def product_with_bfloat16(
    expression: str, matrix: jax.Array, thin: jax.Array, partition: PartitionSpec | None = None
) -> jax.Array:
    """As `product`, of a bfloat16 matrix and a thin one, whose last axis the result ends with.

    A matrix unit multiplies bfloat16 numbers and adds in float32. A product of float32 matrices at
    the highest precision takes six passes of it; where one matrix is bfloat16 already, three do.

    On a TPU a float32 ``thin [..., k]`` is cut into bfloat16 parts, of which one that is not finite
    gives a nan; elsewhere, where bfloat16 may be slow, the matrix is cast.
    """
    if thin.dtype != jnp.float32:
        return product(expression, matrix, thin, partition)
    return jax.lax.platform_dependent(
        matrix,
        thin,
        tpu=lambda a, b: product_by_parts(expression, a, b, partition),
        default=lambda a, b: product(expression, a, b, partition),
    )


def product_by_parts(
    expression: str, matrix: jax.Array, thin: jax.Array, partition: PartitionSpec | None = None
) -> jax.Array:
    """The product with each of three bfloat16 parts of ``thin``, side by side, and their sum."""
    parts = jnp.concatenate(bfloat16_parts(thin), axis=-1)
    products = jnp.einsum(
        expression, matrix, parts, preferred_element_type=thin.dtype, out_sharding=partition
    )
    high, middle, low = jnp.split(products, 3, axis=-1)
    return high + (middle + low)


def bfloat16_parts(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three bfloat16 arrays, each 2⁻⁸ of the one before, whose sum is the float32 ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax.matrices.arithmetic import bfloat16_parts
      >>> print(*bfloat16_parts(jnp.float32(1.2345678)))
      1.23438 0.000192642 1.19209e-07
    """

    def rounded(x: jax.Array) -> jax.Array:
        # Not a cast back and forth, which the compiler may leave out as excess precision.
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    high = rounded(x)
    middle = rounded(x - high)
    low = x - high - middle
    return high.astype(jnp.bfloat16), middle.astype(jnp.bfloat16), low.astype(jnp.bfloat16)
