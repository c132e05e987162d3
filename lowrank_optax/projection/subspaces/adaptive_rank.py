"""A rank that follows the gradient: as many directions as a share of its energy needs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.view import View


class AdaptiveBasis(NamedTuple):
    """The basis of `adaptive_rank`.

    Attributes:
      basis: ``[*batch, d, r]`` float32; columns from the active rank on are zero.
      rank: The active rank ``[*batch]`` int32; zero before the first refresh.
    """

    basis: Any
    rank: Any


def adaptive_rank(
    rule: base.Subspace,
    min_rank: int = 1,
    rank_step: int = 1,
    threshold: float = 0.2,
    monotone: bool = False,
) -> base.Subspace:
    r"""``rule`` with only as many of its directions as the information threshold asks for.

    After a refresh the directions are ordered by energy, and the least rank is taken, in steps of
    ``rank_step`` from ``min_rank``, for which

    .. math::
      \lVert G - P_r P_r^\top G \rVert_F \le \xi \, \lVert G \rVert_F .

    The rank is data: shapes stay, the columns beyond it are zero, and so is all state that belongs
    to them. ``lowrank_optax.compact`` gives that memory back, between steps.

    Args:
      rule: A rule whose basis is an orthonormal array, as `randomized_svd`; its rank is the
        largest.
      min_rank: The least rank.
      rank_step: Distance from one rank considered to the next.
      threshold: The share :math:`\xi` of the gradient's norm that may be lost.
      monotone: Let the rank only fall.

    Raises:
      ValueError: If a number is out of range, or the rule's basis is not such an array.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> rule = lro.subspaces.adaptive_rank(lro.subspaces.svd(4), threshold=0.2)
      >>> gradient = jnp.diag(jnp.array([4.0, 2.0, 1.0, 0.5]))
      >>> view = lro.View.of(gradient, axis=-2, rank=rule.rank)
      >>> rule.refresh(jax.random.key(0), gradient, rule.init(view), None, view).rank.item()
      3

    Reference:
      Refael et al., AdaRankGrad: Adaptive Gradient-Rank and Moments for Memory-Efficient LLMs
      Training and Fine-Tuning, 2024, https://arxiv.org/abs/2410.17881, section 3.
    """
    for name, value in (("min_rank", min_rank), ("rank_step", rank_step)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{name}={value!r} must be an int of at least 1; under optax.inject_hyperparams, "
                "list it in static_args."
            )
    if isinstance(rule.rank, int) and min_rank > rule.rank:
        raise ValueError(f"min_rank={min_rank!r} must be at most the rule's rank, {rule.rank!r}.")
    if isinstance(threshold, int | float) and not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r} must be between 0 and 1.")
    if rule.shared or rule.track is not None or not rule.orthonormal:
        raise ValueError("rule must keep an orthonormal array, as randomized_svd does.")

    def init(view: View) -> AdaptiveBasis:
        basis = rule.init(view)
        if not isinstance(basis, jax.Array) or not jnp.issubdtype(basis.dtype, jnp.floating):
            raise ValueError("rule must keep an orthonormal array, as randomized_svd does.")
        rank = explicit_sharding.zeros(view.batch, jnp.int32, view.partitioned())
        return AdaptiveBasis(basis, rank)

    def refresh(
        key: jax.Array,
        matrix: jax.Array,
        last: AdaptiveBasis,
        momentum: jax.Array | None,
        view: View,
    ) -> AdaptiveBasis:
        basis = rule.refresh(key, matrix, last.basis, momentum, view)
        energy, total = _energies(basis, matrix, view)
        order = jnp.argsort(-energy, axis=-1)
        basis = jnp.take_along_axis(basis, order[..., None, :], axis=-1)
        lost = total[..., None] - jnp.cumsum(jnp.take_along_axis(energy, order, axis=-1), axis=-1)
        rank = _least_rank(lost <= threshold**2 * total[..., None], min_rank, rank_step)
        if monotone:
            rank = jnp.where(last.rank > 0, jnp.minimum(rank, last.rank), rank)
        active = jnp.arange(basis.shape[-1]) < rank[..., None]
        return AdaptiveBasis(jnp.where(active[..., None, :], basis, 0), rank)

    return base.from_basis(
        rule.rank,
        refresh,
        init=init,
        matrix_of=lambda adaptive, view: adaptive.basis,
        follow_momentum=rule.follow_momentum,
        kept=AdaptiveBasis(0, 0),
        size=lambda adaptive: adaptive.basis.shape[-1],
    )


def _energies(basis: jax.Array, matrix: jax.Array, view: View) -> tuple[jax.Array, jax.Array]:
    """Energy on each direction ``[*batch, r]``, and of the whole, in units of the largest entry."""
    unit = base.largest_entry(matrix).astype(basis.dtype)
    projected = base.project(basis, matrix, view) / unit
    energy = jnp.sum(jnp.square(projected), axis=view.across)
    total = jnp.sum(jnp.square(matrix / unit), axis=(-2, -1))
    return energy, total


def _least_rank(enough: jax.Array, min_rank: int, rank_step: int) -> jax.Array:
    """The least rank of the grid with ``enough [*batch, r]``; the largest if there is none."""
    largest = enough.shape[-1]
    grid = [*range(min(min_rank, largest), largest, rank_step), largest]
    considered = (
        jnp.stack([enough[..., rank - 1] for rank in grid[:-1]], axis=-1)
        if (len(grid) > 1)
        else enough[..., :0]
    )
    last = jnp.ones_like(enough[..., :1])
    first = jnp.argmax(jnp.concatenate([considered, last], axis=-1), axis=-1)
    return jnp.minimum(grid[0] + rank_step * first, largest).astype(jnp.int32)
