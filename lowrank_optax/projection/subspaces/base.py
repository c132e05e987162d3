"""What a subspace rule is, and the parts that rules with an orthonormal basis share.

Letters: a gradient matrix is ``[*batch, m, n]``. ``axis`` names the axis that is compressed to the
rank ``r``: -2 (rows, ``d = m``) or -1 (columns, ``d = n``). A basis is ``[*batch, d, r]``, a
projected gradient ``[*batch, r, n]`` or ``[*batch, m, r]``: the other axis stays where it was, so
that neither product needs a transpose.
"""

from collections.abc import Callable
import operator
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.explicit_sharding import product


class Subspace(NamedTuple):
    """A rule for finding and using a subspace of gradient matrices: four pure functions.

    Attributes:
      init: ``init(matrix, axis) -> basis``: what stands for the basis before the first refresh,
        float32 (float64 for a float64 matrix), all zeros. Only the matrix's shape, dtype and
        sharding are used.
      refresh: ``refresh(key, matrix, basis, axis) -> basis``: the basis for this gradient;
        ``basis`` is the last one. The result may be anything at all for a zero or non-finite
        matrix: the caller then keeps the last one.
      project: ``project(basis, matrix, axis) -> projected``.
      lift: ``lift(basis, projected, axis, partition=None) -> matrix``, the adjoint of project.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> rule = lro.subspaces.randomized_svd(rank=1)
      >>> gradient = jnp.outer(jnp.ones(4), jnp.arange(3.0))
      >>> basis = rule.refresh(jax.random.key(0), gradient, rule.init(gradient, -1), -1)
      >>> lifted = rule.lift(basis, rule.project(basis, gradient, -1), -1)
      >>> bool(jnp.allclose(lifted, gradient, atol=1e-5))  # a matrix of rank one is kept whole
      True

    Reference:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, section 4.
    """

    init: Callable[[jax.Array, int], jax.Array]
    refresh: Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]
    project: Callable[[jax.Array, jax.Array, int], jax.Array]
    lift: Callable[..., jax.Array]


def check_rank(rank: Any) -> int:
    """The rank as an int of at least one; an error that names the usual mistakes otherwise."""
    if isinstance(rank, jax.Array):
        raise TypeError(
            f"rank={rank} is an array, but it fixes shapes and must be a Python int; under "
            "optax.inject_hyperparams, list it in static_args."
        )
    try:
        value = operator.index(rank)
    except TypeError:
        raise TypeError(f"rank={rank!r} must be an int.") from None
    if isinstance(rank, bool) or value < 1:
        raise ValueError(f"rank={rank!r} must be an int of at least 1.")
    return value


def clipped_rank(rank: int, matrix: Any) -> int:
    """No matrix has more than ``min(m, n)`` directions."""
    return min(rank, *matrix.shape[-2:])


def replicated(matrix: jax.Array) -> PartitionSpec | None:
    """Partition of a small factor of ``matrix`` on an explicit mesh: its batch axes' alone."""
    return explicit_sharding.partition_of_batch(matrix, None, None)


def times(
    matrix: jax.Array, x: jax.Array, axis: int, partition: PartitionSpec | None = None
) -> jax.Array:
    """``G x`` for rows (``[m, n], [n, k] -> [m, k]``), ``Gᵀ x`` for columns: lands on ``axis``."""
    letters = "...mn,...nk->...mk" if axis == -2 else "...mn,...mk->...nk"
    return product(letters, matrix, x, partition)


def other(axis: int) -> int:
    """The matrix axis that is not ``axis``."""
    return -3 - axis


def init_basis(rank: int) -> Callable[[jax.Array, int], jax.Array]:
    """Zeros ``[*batch, d, r]``: a basis that projects everything to nothing."""

    def init(matrix: jax.Array, axis: int) -> jax.Array:
        dtype = jax.numpy.promote_types(matrix.dtype, jax.numpy.float32)
        shape = (*matrix.shape[:-2], matrix.shape[axis], clipped_rank(rank, matrix))
        return explicit_sharding.zeros(shape, dtype, replicated(matrix))

    return init


def project(basis: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """``Pᵀ G`` or ``G P``, accumulated in the basis' dtype."""
    letters = "...mr,...mn->...rn" if axis == -2 else "...nr,...mn->...mr"
    partition = explicit_sharding.partition_of(matrix)
    if partition is not None:
        kept = (None, partition[-1]) if axis == -2 else (partition[-2], None)
        partition = explicit_sharding.partition_of_batch(matrix, *kept)
    return product(letters, basis, matrix.astype(basis.dtype), partition)


def lift(
    basis: jax.Array, projected: jax.Array, axis: int, partition: PartitionSpec | None = None
) -> jax.Array:
    """``P R`` or ``R Pᵀ``, the adjoint of `project`, partitioned as told on an explicit mesh."""
    letters = "...mr,...rn->...mn" if axis == -2 else "...nr,...mr->...mn"
    return product(letters, basis, projected.astype(basis.dtype), partition)
