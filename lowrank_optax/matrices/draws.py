"""Random numbers of an array, drawn with one key or with a key for each of its rows."""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp

Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def drawn(draw: Draw, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``draw(key, shape)``, row by row where there is a key for each row.

    Rows drawn with keys of their own are the same in an array and in a part of it.

    Args:
      draw: Such as ``jax.random.uniform``.
      key: A key, or keys ``[rows]``. Where the first axis is no multiple of them, as of blocks that
        go over several rows, so many rows as make whole ones share the first one's key.
      shape: Shape of the result.

    Example:
      >>> import jax
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> x = drawn(jax.random.uniform, keys, (4, 8))
      >>> print((x[2:] == drawn(jax.random.uniform, keys[2:], (2, 8))).all())
      True
    """
    if _is_one(key):
        return draw(key, shape)
    runs = math.gcd(shape[0], key.shape[0])
    if runs == 0:
        return draw(jax.random.key(0), shape)  # of no elements
    of_run = lambda key: draw(key, (shape[0] // runs, *shape[1:]))
    return jax.vmap(of_run)(key[:: key.shape[0] // runs]).reshape(shape)


def split(key: jax.Array) -> jax.Array:
    """``jax.random.split`` of a key, or of each of several: two of what is given."""
    return jax.random.split(key) if _is_one(key) else jax.vmap(jax.random.split, out_axes=1)(key)


def _is_one(key: jax.Array) -> bool:
    return key.ndim == 0 or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
