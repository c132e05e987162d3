"""The exact rule of GaLore: the leading singular vectors of the gradient itself."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.orthonormal import in_turn
from lowrank_optax.projection.rank import RankSpec
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.view import View


def svd(rank: RankSpec) -> base.Subspace:
    """Subspace of the ``rank`` leading singular vectors, by an exact SVD of the gradient.

    Exact, and slow where it matters: on a TPU an SVD of a few hundred columns takes minutes to
    compile, and a gradient sharded over its matrix axes is gathered first. It is there for small
    models, for CPU, and as the reference for `randomized_svd`, which is the default everywhere.

    Args:
      rank: Number of directions kept; at most the smaller side of each matrix.

    Raises:
      TypeError: If ``rank`` is none.
      ValueError: If ``rank`` is below 1.

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
