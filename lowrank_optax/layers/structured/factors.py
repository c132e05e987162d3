"""Two factors of a weight, and those that come nearest to given matrices, by SVD of their parts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from lowrank_optax.matrices.orthonormal import in_turn


class Factors(NamedTuple):
    """The two factors of a weight, or of a stack of weights.

    Attributes:
      first: ``V``, which the input meets.
      second: ``U``, which makes the output.
    """

    first: jax.Array
    second: jax.Array


def cast(factors: Factors, dtype: DTypeLike) -> Factors:
    """The factors in another dtype."""
    return Factors(*(x.astype(dtype) for x in factors))


def in_float32(x: jax.Array) -> jax.Array:
    """The array in float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum in full precision, on a TPU too."""
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)


def low_rank_factors(matrices: jax.Array, rank: int) -> Factors:
    """The factors ``[..., m, rank]`` and ``[..., rank, n]`` nearest to ``[..., m, n]``.

    The singular values are shared evenly by the two.
    """
    left, values, right = in_turn(
        lambda a: tuple(jnp.linalg.svd(a, full_matrices=False)), in_float32(matrices)
    )
    root = jnp.sqrt(values[..., :rank])
    return Factors(left[..., :rank] * root[..., None, :], root[..., None] * right[..., :rank, :])


def block_shuffle_factors(matrices: jax.Array, blocks: int) -> Factors:
    """The factors of `BlockShuffle` nearest to ``[..., N, M]``.

    The rows of one block of ``V`` and the columns of one block of ``U`` meet in a part of the
    weight whose rank is the number of hidden units that belong to both: its truncated SVD.
    """
    rows, columns = matrices.shape[-2:]
    width = min(rows, columns) // blocks
    parts = matrices.reshape(
        *matrices.shape[:-2], blocks, rows // blocks, columns // blocks, blocks
    )
    parts = jnp.moveaxis(parts, -1, -3)  # [..., block of V, block of U, rows, columns]
    v, u = low_rank_factors(parts, -(-width // blocks))
    # Each hidden unit: the two blocks that meet in it, and its number in their part.
    unit = np.arange(blocks * width)
    in_v, in_u = unit // width, unit % blocks
    first_in_part = -(-(in_v * width - in_u) // blocks)
    number = unit // blocks - first_in_part
    v = jnp.moveaxis(v, -1, -2)[..., in_v, in_u, number, :]  # [..., hidden units, rows]
    u = u[..., in_v, in_u, number, :]  # [..., hidden units, columns]
    v = v.reshape(*v.shape[:-2], blocks, width, v.shape[-1])
    u = u.reshape(*u.shape[:-2], width, blocks, u.shape[-1])
    return Factors(jnp.moveaxis(v, -1, -2), jnp.moveaxis(u, -2, -3))
