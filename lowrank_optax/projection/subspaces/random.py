"""Random bases of which only the seed is kept: no gradient is looked at, nothing is stored."""

from collections.abc import Callable
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.projection.rank import RankSpec
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.subspaces.dct import cosines
from lowrank_optax.projection.view import View

Kind = Literal["gaussian", "orthonormal", "rademacher", "sparse"]


def random(rank: RankSpec, kind: Kind = "gaussian") -> base.Subspace:
    """Subspace spanned by random vectors, drawn anew at each refresh from a seed.

    One seed serves all leaves; the basis is drawn where it is used, in every step, and depends on
    the seed, its length and the rank alone. So nothing is stored, and leaves of equal size share
    what is drawn.

    Args:
      rank: Number of vectors; at most the smaller side of each matrix.
      kind: ``"gaussian"``, entries ``N(0, 1/r)``, for which ``E[P Pᵀ] = I`` (APOLLO, Flora);
        ``"rademacher"``, entries ``±1/√r``, and ``"sparse"``, entries ``±√(3/r)`` for a third of
        them and zero otherwise, which have the same mean and are cheaper to draw; or
        ``"orthonormal"``, a random choice of cosines with random signs, for which ``PᵀP = I`` and
        ``E[P Pᵀ] = (r/d) I`` (not uniform on the Stiefel manifold, but drawn without a QR).

    Raises:
      TypeError: If ``rank`` is none.
      ValueError: If ``rank`` is below 1, or ``kind`` unknown.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> rule = lro.subspaces.random(rank=4, kind="orthonormal")
      >>> view = lro.View.of(jnp.zeros((16, 32)), axis=-2, rank=rule.rank)
      >>> seed = rule.refresh(jax.random.key(0), None, None, None, None)
      >>> basis = rule.lift(seed, jnp.eye(4), view)  # [16, 4]
      >>> bool(jnp.allclose(basis.T @ basis, jnp.eye(4), atol=1e-5))
      True

    References:
      Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270. Hao et al., Flora, 2024,
      https://arxiv.org/abs/2402.03293. Achlioptas, Database-friendly random projections, 2003.
      Ailon and Chazelle, The fast Johnson–Lindenstrauss transform, 2009.
    """
    if kind not in _DRAW:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, _DRAW))}.")

    def refresh(key: jax.Array, matrix: Any, basis: Any, momentum: Any, view: Any) -> jax.Array:
        del matrix, basis, momentum, view
        return jax.random.bits(key, (), jnp.uint32)

    def matrix_of(seed: jax.Array, view: View) -> jax.Array:
        drawn = _DRAW[kind](jax.random.key(seed), view.length, view.rank, view.dtype)
        stacked = jnp.broadcast_to(drawn, (*view.batch, view.length, view.rank))
        return explicit_sharding.constrain(stacked, view.small_partition)

    return base.from_basis(
        rank,
        refresh,
        init=lambda view: jnp.zeros((), jnp.uint32),
        matrix_of=matrix_of,
        shared=True,
        orthonormal=kind == "orthonormal",
    )


def _gaussian(key: jax.Array, length: int, rank: int, dtype: Any) -> jax.Array:
    return jax.random.normal(key, (length, rank), dtype) / math.sqrt(rank)


def _signs(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random ±1, one for each bit drawn."""
    count = math.prod(shape)
    words = jax.random.bits(key, (-(-count // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (1 - 2 * bits.reshape(-1)[:count].reshape(shape).astype(jnp.int32)).astype(dtype)


def _rademacher(key: jax.Array, length: int, rank: int, dtype: Any) -> jax.Array:
    return _signs(key, (length, rank), dtype) / math.sqrt(rank)


def _sparse(key: jax.Array, length: int, rank: int, dtype: Any) -> jax.Array:
    chosen, signs = jax.random.split(key)
    kept = jax.random.bernoulli(chosen, 1 / 3, (length, rank))
    return jnp.where(kept, _signs(signs, (length, rank), dtype), 0) * math.sqrt(3 / rank)


def _orthonormal(key: jax.Array, length: int, rank: int, dtype: Any) -> jax.Array:
    choice, signs = jax.random.split(key)
    frequencies = jax.random.permutation(choice, length)[:rank].astype(jnp.int32)
    return cosines(frequencies, length, dtype) * _signs(signs, (length, 1), dtype)


_DRAW: dict[str, Callable[[jax.Array, int, int, Any], jax.Array]] = {
    "gaussian": _gaussian,
    "orthonormal": _orthonormal,
    "rademacher": _rademacher,
    "sparse": _sparse,
}
