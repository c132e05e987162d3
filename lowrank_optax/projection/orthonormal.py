"""Orthonormal bases by matrix products and small QRs: what subspace rules share.

On a TPU a QR of more than a few hundred columns compiles for a minute, an eigendecomposition or
SVD of more than 128 for several; on a CPU LAPACK does either in milliseconds. So what runs is
chosen for the platform the program is lowered to.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.explicit_sharding import product

QR_COLUMNS = 320
EIGH_COLUMNS = 128


def orthonormalize(y: jax.Array) -> jax.Array:
    """An orthonormal basis ``[*batch, d, k]`` of the columns of ``y [*batch, d, k]``, ``d >= k``.

    QR on a CPU, and elsewhere up to 320 columns; Newton–Schulz beyond.
    """
    if y.shape[-1] <= QR_COLUMNS:
        return _qr(y)
    return jax.lax.platform_dependent(y, cpu=_qr, default=newton_schulz)


def _qr(y: jax.Array) -> jax.Array:
    # jnp.linalg.qr refuses batch axes that are sharded on an explicit mesh (jax 0.10).
    partition = explicit_sharding.partition_of(y)
    everywhere = None if partition is None else PartitionSpec(*[None] * y.ndim)
    q = jnp.linalg.qr(explicit_sharding.constrain(y, everywhere))[0]
    return explicit_sharding.constrain(q, partition)


def leading_eigenvectors(gram: jax.Array, count: int) -> jax.Array:
    """Eigenvectors ``[*batch, k, count]`` of the largest eigenvalues of ``gram [*batch, k, k]``.

    In descending order, and exact on a CPU, and elsewhere up to 128 columns; `orthogonal_iteration`
    beyond.
    """
    exact = lambda a: jnp.linalg.eigh(a)[1][..., ::-1][..., :count]
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


def newton_schulz(y: jax.Array) -> jax.Array:
    """The orthonormal polar factor of ``y [*batch, d, k]``, ``d >= k``, by matrix products alone.

    Directions that ``y`` does not have, to working precision, are filled with random ones: a first
    pass leaves their singular values near zero, where ``I - XᵀX`` finds them, and a second pass
    makes the filled matrix orthonormal. Thus rank-deficient gradients still get a full basis.

    Source: Björck and Bowie, SIAM J. Numer. Anal. 8 (1971), for the convergent polynomial; Jordan
    et al., Muon (2024), for the fast one that comes before it.
    """
    norm = jnp.linalg.norm(y, axis=(-2, -1), keepdims=True)
    start = y / jnp.where(norm == 0, 1, norm)
    # A loop, though of two passes, so that compilers meet the polynomial once.
    both = lambda _, carry: (polar := _polar(carry[1]), _fill_missing(polar) / 2)
    return jax.lax.fori_loop(0, 2, both, (start, start))[0]


def _fill_missing(x: jax.Array) -> jax.Array:
    """``x`` plus random directions outside its span, where singular values are not one but zero."""
    missing = jnp.eye(x.shape[-1], dtype=x.dtype) - product("...dk,...dl->...kl", x, x)
    noise = jax.random.normal(jax.random.key(0), x.shape[-2:], x.dtype) / x.shape[-2] ** 0.5
    inside = product("...dk,...dl->...kl", x, jnp.broadcast_to(noise, x.shape))
    outside = noise - product("...dk,...kl->...dl", x, inside)
    return x + product("...dk,...kl->...dl", outside, missing)


def _polar(x: jax.Array) -> jax.Array:
    """Takes singular values in (about 1e-6, 1] to 1: twelve fast steps, then five convergent."""
    fast, convergent = (3.4445, -4.7750, 2.0315), (15 / 8, -10 / 8, 3 / 8)
    coefficients = jnp.array([fast] * 12 + [convergent] * 5, x.dtype)

    def step(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
        gram = product("...dk,...dl->...kl", x, x)
        polynomial = abc[1] * gram + abc[2] * product("...kl,...lj->...kj", gram, gram)
        return abc[0] * x + product("...dk,...kl->...dl", x, polynomial), None

    return jax.lax.scan(step, x, coefficients)[0]
