"""Subspaces that do not depend on the gradient: random ones, stored as a seed, and given ones."""

from collections.abc import Callable, Mapping
import math
import re
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.subspaces.dct import cosines
from lowrank_optax.projection.view import RankSpec, View

Kind = Literal["gaussian", "orthonormal", "rademacher", "sparse"]


def random(rank: RankSpec, kind: Kind = "gaussian") -> base.Subspace:
    """Subspace spanned by random vectors, drawn again at each refresh; only a seed is stored.

    One seed serves all leaves. The basis is drawn in every step where it is used, and depends only
    on the seed, its length and the rank, so leaves of equal size share it.

    Args:
      rank: Number of vectors; at most the smaller side of each matrix.
      kind: ``"gaussian"``, entries ``N(0, 1/r)``, for which ``E[P Pᵀ] = I`` (APOLLO, Flora);
        ``"rademacher"``, entries ``±1/√r``, and ``"sparse"``, entries ``±√(3/r)`` for a third of
        them and zero otherwise, with the same mean and cheaper to draw; or ``"orthonormal"``,
        randomly chosen cosines with random signs, for which ``PᵀP = I`` and ``E[P Pᵀ] = (r/d) I``
        (not uniform on the Stiefel manifold, but drawn without a QR).

    Raises:
      TypeError: If `rank` is of another type.
      ValueError: If `rank` is below 1, or `kind` unknown.

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
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, get_args(Kind)))}.")

    def refresh(key: jax.Array, matrix: Any, basis: Any, momentum: Any, view: Any) -> jax.Array:
        del matrix, basis, momentum, view
        return jax.random.bits(key, (), jnp.uint32)

    def matrix_of(seed: jax.Array, view: View) -> jax.Array:
        drawn = _draw(kind, jax.random.key(seed), view.length, view.rank, view.dtype)
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


def _draw(kind: Kind, key: jax.Array, length: int, rank: int, dtype: Any) -> jax.Array:
    if kind == "gaussian":
        return jax.random.normal(key, (length, rank), dtype) / math.sqrt(rank)
    if kind == "rademacher":
        return _signs(key, (length, rank), dtype) / math.sqrt(rank)
    choice, signs = jax.random.split(key)
    if kind == "sparse":
        nonzero = jax.random.bernoulli(choice, 1 / 3, (length, rank))
        return jnp.where(nonzero, _signs(signs, (length, rank), dtype), 0) * math.sqrt(3 / rank)
    frequencies = jax.random.permutation(choice, length)[:rank].astype(jnp.int32)
    return cosines(frequencies, length, dtype) * _signs(signs, (length, 1), dtype)


def _signs(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random ±1, one for each bit drawn."""
    count = math.prod(shape)
    words = jax.random.bits(key, (-(-count // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (1 - 2 * bits.reshape(-1)[:count].reshape(shape).astype(jnp.int32)).astype(dtype)


BasisSource: TypeAlias = (
    jax.Array | Mapping[str, jax.Array] | Callable[[str, tuple[int, ...]], jax.Array]
)


def fixed(basis: BasisSource, orthonormal: bool = True) -> base.Subspace:
    """Subspace of a given basis: a frozen LoRA factor, or one found elsewhere.

    Training with it and no residual is training the other factor: for ``W + P B`` with ``P``
    frozen, the projected gradient ``PᵀG`` is the gradient of ``B``.

    Args:
      basis: Array ``[d, r]`` (or ``[*batch, d, r]``, one for each matrix of a stack) for all
        matrices, a mapping from patterns of paths (``re.search``, the first that is found) to such
        arrays, or a function of ``(path, shape)`` that returns one.
      orthonormal: Whether ``PᵀP = I``.

    Raises:
      ValueError: In ``init``: if no pattern is found in a path, or a pattern in no path; or if a
        basis has not the ``d`` rows of the compressed axis, or more columns than ``min(m, n)``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> rule = lro.subspaces.fixed(jnp.eye(4, 2))
      >>> tx = lro.scale_by_projection(optax.identity(), rule, side="rows")
      >>> gradient = {"kernel": jnp.ones((4, 3))}
      >>> tx.update(gradient, tx.init(gradient))[0]["kernel"].sum(axis=1).tolist()
      [3.0, 3.0, 0.0, 0.0]

    Reference:
      Zhang et al., LoRA-FA, 2023, https://arxiv.org/abs/2308.03303, section 3.
    """

    def basis_for(path: str, shape: tuple[int, ...]) -> jax.Array:
        source: Any = basis
        if isinstance(basis, Mapping):
            source = next((x for pattern, x in basis.items() if re.search(pattern, path)), None)
            if source is None:
                message = f"basis has no pattern for {path!r}: its patterns are {list(basis)}."
                raise ValueError(message)
        return source(path, shape) if callable(source) else source

    def init(view: View) -> jax.Array:
        array = jnp.asarray(basis_for(view.path, view.shape), view.dtype)
        expected = (*view.batch, view.length, view.rank)
        if array.shape not in (expected, expected[-2:]):
            raise ValueError(
                f"basis of shape {array.shape} does not fit {view.path!r} of shape {view.shape}, "
                f"whose axis of {view.length} is compressed: it must be [{view.length}, r] with "
                f"r at most {min(view.shape[-2:])}."
            )
        stacked = jnp.array(jnp.broadcast_to(array, expected))
        return explicit_sharding.constrain(stacked, view.small_partition)

    def refresh(key: jax.Array, matrix: Any, last: jax.Array, momentum: Any, view: Any) -> Any:
        del key, matrix, momentum, view
        return last

    rank = lambda path, shape: jnp.shape(basis_for(path, shape))[-1]
    patterns = {"basis": tuple(basis)} if isinstance(basis, Mapping) else {}
    return base.from_basis(
        rank, refresh, init=init, orthonormal=orthonormal, refreshes=False, patterns=patterns
    )
