"""Orthonormal bases: what subspace rules share.

On a TPU a batch of QRs compiles for a minute, an eigendecomposition or SVD of more than 128 columns
for several; on a CPU LAPACK does either in milliseconds. So what runs is chosen for the platform
the program is lowered to.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.explicit_sharding import product

BLOCK_COLUMNS = 128  # as many as a TPU has lanes: others compile three times as long
EIGH_COLUMNS = 128


@functools.partial(jax.jit, inline=True)  # outside of a jit it is compiled once
def orthonormalize(y: jax.Array) -> jax.Array:
    """An orthonormal basis ``[*batch, d, k]`` of the columns of ``y [*batch, d, k]``, ``d >= k``.

    LAPACK's or cuSOLVER's QR where there is one, `gram_schmidt` on a TPU.
    """
    return jax.lax.platform_dependent(y, cpu=_qr, cuda=_qr, default=gram_schmidt)


def _qr(y: jax.Array) -> jax.Array:
    return in_turn(lambda y: jnp.linalg.qr(y)[0], y)


def in_turn(factorize: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """``factorize(x)`` of ``x [*batch, m, n]``, one matrix after another on a CPU.

    Every call of LAPACK in this package is made here. For a batch it occupies a thread of the pool
    that runs the program, and waits for others of that pool (``ParallelBatchMap`` of jaxlib). These
    never come free if other devices occupy them in the same way, or wait in a collective for the
    device that waits here. A single matrix is factorized by the thread that asks for it.

    Args:
      factorize: Function of ``[*batch, m, n]`` whose results each begin with the batch axes.
      x: Matrices. On explicit mesh axes each device factorizes those of its part of the batch.
    """
    partition = explicit_sharding.partition_of_batch(x, None, None)
    x = explicit_sharding.constrain(x, partition)
    if partition is None or all(axis is None for axis in partition):
        return _each_in_turn(factorize, x)
    of_device, batch = functools.partial(_each_in_turn, factorize), PartitionSpec(*partition[:-2])
    # Without `mesh` it would have to be that of the context, which eager calls need not have.
    mesh = jax.typeof(x).sharding.mesh
    return jax.shard_map(of_device, mesh=mesh, in_specs=batch, out_specs=batch)(x)


def _each_in_turn(factorize: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    def each(x: jax.Array) -> Any:
        # Under vmap too; a lambda, because defaults of `factorize` would be taken for arrays.
        alone = jax.custom_batching.sequential_vmap(lambda x: factorize(x))
        if x.ndim == 2:
            return alone(x)
        found = jax.lax.map(alone, x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]))
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), found)

    return jax.lax.platform_dependent(x, cpu=each, default=factorize)


def gram_matrix(b: jax.Array) -> jax.Array:
    """``bᵀ b [*batch, k, k]`` of ``b [*batch, n, k]``."""
    small = explicit_sharding.partition_of_batch(b, None, None)
    return product("...nk,...nl->...kl", b, b, small)


def leading_directions(q: jax.Array, gram: jax.Array, count: int) -> jax.Array:
    """``q [*batch, d, k]`` times the `leading_eigenvectors` of ``gram [*batch, k, k]``."""
    small = explicit_sharding.partition_of_batch(q, None, None)
    return product("...dk,...kr->...dr", q, leading_eigenvectors(gram, count), small)


def leading_eigenvectors(gram: jax.Array, count: int) -> jax.Array:
    """Eigenvectors ``[*batch, k, count]`` of the largest eigenvalues of ``gram [*batch, k, k]``.

    In descending order, and exact on a CPU, and elsewhere up to 128 columns; `orthogonal_iteration`
    beyond.
    """
    exact = lambda a: in_turn(lambda a: jnp.linalg.eigh(a)[1], a)[..., ::-1][..., :count]
    if gram.shape[-1] <= EIGH_COLUMNS:
        return exact(gram)
    iterated = lambda a: orthogonal_iteration(a, count)
    return jax.lax.platform_dependent(gram, cpu=exact, default=iterated)


def orthogonal_iteration(gram: jax.Array, count: int) -> jax.Array:
    """Nearly the leading eigenvectors, by four steps of orthogonal iteration.

    The span misses directions only where eigenvalues nearly tie, which costs a projection no
    energy; the order is approximate.
    """
    start = jnp.broadcast_to(
        jnp.eye(gram.shape[-1], count, dtype=gram.dtype), (*gram.shape[:-1], count)
    )
    step = lambda _, v: orthonormalize(product("...kl,...lr->...kr", gram, v))
    return jax.lax.fori_loop(0, 4, step, start)


def gram_schmidt(y: jax.Array) -> jax.Array:
    """As a QR of ``y [*batch, d, k]``, by products alone: Gram–Schmidt by blocks and columns.

    A TPU's compiler takes a minute for a batch of QRs, and a second for these loops. Blocks are
    made orthogonal to those before them by products of matrices, their columns by products with
    vectors, all of it twice: once is not enough for what lies almost in the span of what came
    before (Giraud et al., Rounding error analysis of the classical Gram-Schmidt orthogonalization
    process, 2005). Directions that ``y`` lacks are filled in.
    """
    columns, width = y.shape[-1], BLOCK_COLUMNS
    blocks = -(-columns // width)
    padding = [(0, 0)] * (y.ndim - 1) + [(0, blocks * width - columns)]

    def step(i: jax.Array, done: jax.Array) -> jax.Array:
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, i * width, width, axis=-1)
        block = take(padded)
        scale = jnp.max(jnp.abs(block), axis=(-2, -1), keepdims=True)
        # Below rounding, but it gives directions to blocks that have none.
        block = block / jnp.where(scale == 0, 1, scale) + jnp.finfo(y.dtype).eps * take(noise)
        again = lambda _, x: _orthonormal_columns(_without(done, x))
        block = jax.lax.fori_loop(0, 2, again, block)
        return jax.lax.dynamic_update_slice_in_dim(done, block, i * width, axis=-1)

    padded = jnp.pad(y, padding)
    noise = jax.random.normal(jax.random.key(0), padded.shape[-2:], y.dtype)
    return jax.lax.fori_loop(0, blocks, step, jnp.zeros_like(padded))[..., :columns]


def _orthonormal_columns(x: jax.Array) -> jax.Array:
    """Gram–Schmidt of the columns of a narrow ``x [*batch, d, w]``, one after the other."""
    place = jnp.arange(x.shape[-1])

    def step(j: jax.Array, x: jax.Array) -> jax.Array:
        column = jax.lax.dynamic_slice_in_dim(x, j, 1, axis=-1)
        done = jnp.where(place < j, x, 0)
        column = jax.lax.fori_loop(0, 2, lambda _, v: _unit(_without(done, v)), column)
        return jax.lax.dynamic_update_slice_in_dim(x, column, j, axis=-1)

    return jax.lax.fori_loop(0, x.shape[-1], step, x)


def _without(done: jax.Array, x: jax.Array) -> jax.Array:
    """``x [*batch, d, w]`` less its part in the span of the orthonormal ``done [*batch, d, k]``."""
    inside = product("...dk,...dw->...kw", done, x)
    return x - product("...dk,...kw->...dw", done, inside)


def _unit(x: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-2, keepdims=True))
    return x / jnp.where(norm == 0, 1, norm)
