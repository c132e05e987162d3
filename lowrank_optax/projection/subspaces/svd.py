"""The exact rule of GaLore: the leading singular vectors of the gradient itself."""

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.projection.subspaces import base


def svd(rank: int) -> base.Subspace:
    """Subspace of the ``rank`` leading singular vectors, by an exact SVD of the gradient.

    Exact, and slow where it matters: on a TPU an SVD of a few hundred columns takes minutes to
    compile, and a gradient sharded over its matrix axes is gathered first. It is there for small
    models, for CPU, and as the reference for `randomized_svd`, which is the default everywhere.

    Args:
      rank: Number of directions kept; clipped to the smaller side of each matrix.

    Raises:
      TypeError: If ``rank`` is not an int.
      ValueError: If ``rank`` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> rule = lro.subspaces.svd(rank=1)
      >>> gradient = jnp.array([[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]])
      >>> basis = rule.refresh(jax.random.key(0), gradient, rule.init(gradient, -2), -2)
      >>> print(jnp.abs(basis).ravel().round(4))
      [0.8911 0.4538]

    Reference:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, Algorithm 2.
    """
    rank = base.check_rank(rank)

    def refresh(key: jax.Array, matrix: jax.Array, basis: jax.Array, axis: int) -> jax.Array:
        del key
        gathered = explicit_sharding.constrain(matrix, base.replicated(matrix))
        # LAPACK need not return from a matrix that is not finite.
        finite = jnp.all(jnp.isfinite(gathered), axis=(-2, -1), keepdims=True)
        gathered = jnp.where(finite, gathered, 0).astype(basis.dtype)
        u, _, vh = jnp.linalg.svd(gathered, full_matrices=False)
        vectors = u if axis == -2 else vh.mT
        return vectors[..., : basis.shape[-1]]

    return base.Subspace(base.init_basis(rank), refresh, base.project, base.lift)
