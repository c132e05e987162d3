"""Leading singular vectors of the gradient: by a randomized range finder (the default), or exactly.

An SVD of the gradient costs ``O(m n min(m, n))`` and does not compile in reasonable time on a TPU.
A sketch of ``r + oversample`` random combinations of the gradient's columns, sharpened by power
iterations, spans nearly the same subspace for a few products of ``O(m n r)``.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.orthonormal import (
    gram_matrix,
    in_turn,
    leading_directions,
    orthonormalize,
)
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.view import RankSpec, View


def svd(rank: RankSpec) -> base.Subspace:
    """Subspace of the ``rank`` leading singular vectors, by an exact SVD of the gradient.

    On a TPU an SVD of a few hundred columns takes minutes to compile, and a gradient sharded over
    its matrix axes is gathered first. It is for small models, for CPU, and a reference for
    `randomized_svd`, the default everywhere.

    Args:
      rank: Number of directions; at most the smaller side of each matrix.

    Raises:
      TypeError: If `rank` is of another type.
      ValueError: If `rank` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> rule, gradient = lro.subspaces.svd(rank=1), jnp.array([[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]])
      >>> view = lro.View.of(gradient, axis=-2, rank=rule.rank)
      >>> basis = rule.refresh(jax.random.key(0), gradient, rule.init(view), None, view)
      >>> print(jnp.abs(basis).ravel().round(4))
      [0.8911 0.4538]

    Reference:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, Algorithm 2.
    """

    def refresh(
        key: jax.Array, matrix: jax.Array, basis: jax.Array, momentum: Any, view: View
    ) -> jax.Array:
        del key, momentum
        gathered = explicit_sharding.constrain(matrix, view.small_partition)
        # LAPACK need not return from a matrix that is not finite.
        finite = jnp.all(jnp.isfinite(gathered), axis=(-2, -1), keepdims=True)
        gathered = jnp.where(finite, gathered, 0).astype(basis.dtype)
        u, _, vh = in_turn(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)), gathered)
        vectors = u if view.axis == -2 else vh.mT
        return base.agreeing(vectors[..., : basis.shape[-1]], basis)

    return base.from_basis(rank, refresh)


def randomized_svd(
    rank: RankSpec, oversample: int = 8, power_iterations: int = 1, warm_start: bool = False
) -> base.Subspace:
    """Subspace of nearly the ``rank`` leading singular vectors, by a randomized range finder.

    With ``B`` a Gaussian ``[n, r + oversample]``, ``Q = orth(G B)`` and ``B = Gᵀ Q`` once, and
    again for each of ``power_iterations``; then the leading eigenvectors ``U`` of the small Gram
    matrix ``Bᵀ B`` give approximate singular vectors in descending order, ``P = Q U``. All products
    are at full float32 precision; ``orth`` is a QR, or on a TPU Gram–Schmidt by blocks, which
    compiles in a tenth of the time. The Gaussian depends only on the key and the shape, so stacked
    and separate weights get the same bases.

    Args:
      rank: Number of directions; at most the smaller side of each matrix.
      oversample: Further directions in the sketch, dropped at the end.
      power_iterations: Number of multiplications of the sketch by ``G Gᵀ``. One captures the energy
        of the exact subspace within a fraction of a percent; zero is a third cheaper.
      warm_start: Whether to start from ``Gᵀ P`` of the last basis and `oversample` Gaussians,
        instead of only Gaussians: one product more, and as good as one more power iteration while
        the subspace moves slowly.

    Raises:
      TypeError: If one of the first three is of another type.
      ValueError: If `rank` is below 1, or one of the next two below 0.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> rule, gradient = lro.subspaces.randomized_svd(2), jnp.diag(jnp.array([3.0, 2.0, 0.1]))
      >>> view = lro.View.of(gradient, axis=-2, rank=rule.rank)
      >>> basis = rule.refresh(jax.random.key(0), gradient, rule.init(view), None, view)
      >>> print(f"{jnp.sum(rule.project(basis, gradient, view) ** 2):.3f} of 13.01")
      13.000 of 13.01

    References:
      Halko, Martinsson and Tropp, Finding structure with randomness, 2011,
      https://arxiv.org/abs/0909.4061, Algorithms 4.4 and 5.1.
      Su et al., GaLore 2, 2025, https://arxiv.org/abs/2504.20437.
    """
    for name, value in (("oversample", oversample), ("power_iterations", power_iterations)):
        if not isinstance(value, int):
            raise TypeError(f"{name}={value!r} must be a Python int.")
        if value < 0:
            raise ValueError(f"{name}={value!r} must be at least 0.")

    def refresh(
        key: jax.Array, matrix: jax.Array, basis: jax.Array, momentum: Any, view: View
    ) -> jax.Array:
        del momentum
        columns = min(basis.shape[-1] + oversample, *view.shape[-2:])
        drawn = jax.random.normal(key, (view.shape[view.across], columns), basis.dtype)
        sketch = jnp.broadcast_to(drawn, (*view.batch, *drawn.shape))
        if warm_start:
            last = base.scaled(base.times(matrix, basis, view, across=True))
            usable = jnp.any(last != 0, axis=(-2, -1), keepdims=True)
            rank = last.shape[-1]
            sketch = sketch.at[..., :rank].set(jnp.where(usable, last, sketch[..., :rank]))

        def iterate(_: jax.Array, last: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            q = orthonormalize(base.times(matrix, last[1], view))
            return q, base.scaled(base.times(matrix, q, view, across=True))

        # A loop even of few iterations: a QR takes a TPU's compiler seconds.
        start = explicit_sharding.constrain(
            jnp.zeros((*view.batch, view.length, columns), basis.dtype), view.small_partition
        )
        sketch = explicit_sharding.constrain(sketch, view.small_partition)
        q, b = jax.lax.fori_loop(0, power_iterations + 1, iterate, (start, sketch))
        found = leading_directions(q, gram_matrix(b), basis.shape[-1])
        return base.agreeing(found, basis)

    return base.from_basis(rank, refresh)
