"""Sums over one axis of several arrays that are computed from the same ones, in a single pass."""

import jax
import jax.numpy as jnp


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
