"""A basis that is itself trained: one small optimizer step of online PCA after every step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.projection.moments import init_one, update_one
from lowrank_optax.projection.rank import RankSpec
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.subspaces.randomized_svd import randomized_svd
from lowrank_optax.projection.view import View
from lowrank_optax.states.arguments import transformation


class TrackedBasis(NamedTuple):
    """The basis of `online_pca`, and the state of the optimizer that moves it.

    Attributes:
      basis: ``[*batch, d, r]`` float32, near orthonormal but not forced to be.
      optimizer: State of the basis' optimizer.
    """

    basis: Any
    optimizer: Any


def online_pca(
    rank: RankSpec,
    optimizer: optax.GradientTransformation | None = None,
    penalty: float = 0.1,
    initial: base.Subspace | None = None,
) -> base.Subspace:
    r"""Subspace that is trained along with the model, by one step of online PCA after every step.

    With :math:`A = G / \lVert G \rVert_F`, the basis descends

    .. math::
      L(P) = \lVert P P^\top A - A \rVert_F^2 + \lambda \lVert P^\top P - I \rVert_F^2

    whose gradient needs one product with ``G`` besides ``PᵀG``, which the step has anyway. Nothing
    is decomposed after the first step and no step costs more than another: use it with
    ``refresh_every=None``. The basis is not orthonormal to working precision; lifting is the exact
    transpose of projecting all the same, as the convergence proof asks.

    Args:
      rank: Number of directions; at most the smaller side of each matrix.
      optimizer: Any elementwise optax optimizer, for the basis; ``optax.adam(0.005)`` if None (the
        paper's rate, 5 times 0.001).
      penalty: The weight :math:`\lambda`. The official code has no such term: 0 is parity.
      initial: Rule of the first basis; ``randomized_svd(rank)`` if None (the code: exact SVD).

    Raises:
      TypeError: If ``rank`` is none.
      ValueError: If ``rank`` is below 1, or ``penalty`` below 0; if ``initial`` keeps other things
        than one array of floats, or (when the optimizer's state is made) has another rank.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> gradient = jnp.diag(jnp.array([3.0, 1.0]))
      >>> rule = lro.subspaces.online_pca(1, optax.sgd(0.1))
      >>> view = lro.View.of(gradient, axis=-2, rank=rule.rank)
      >>> basis = rule.init(view)._replace(basis=jnp.array([[0.6], [0.8]]))
      >>> for _ in range(60):
      ...     basis = rule.track(basis, gradient, rule.project(basis, gradient, view), view)
      >>> print(basis.basis.ravel().round(2))
      [1. 0.]

    Reference:
      Liang et al., Memory-Efficient LLM Training with Online Subspace Descent, 2024,
      https://arxiv.org/abs/2408.12857, section 4 and Algorithm 1.
    """
    if isinstance(penalty, int | float) and penalty < 0:
        raise ValueError(f"penalty={penalty!r} must be at least 0.")
    first_rule = randomized_svd(rank) if initial is None else initial
    moves = optax.adam(0.005) if optimizer is None else optimizer
    basis_optimizer = transformation("optimizer", moves)

    zero_basis = base.zero_basis_before(first_rule)

    def init(view: View) -> TrackedBasis:
        zeros = zero_basis(view)
        return TrackedBasis(zeros, init_one(basis_optimizer, zeros, len(view.batch)))

    def refresh(
        key: jax.Array, matrix: jax.Array, last: TrackedBasis, momentum: Any, view: View
    ) -> TrackedBasis:
        del momentum
        basis = base.first_basis(first_rule, key, matrix, last.basis, view)
        return last._replace(basis=basis)

    def track(
        last: TrackedBasis, matrix: jax.Array, projected: jax.Array, view: View
    ) -> TrackedBasis:
        gradient = pca_gradient(last.basis, matrix, projected, penalty, view)
        updates, state = update_one(
            basis_optimizer, gradient, last.optimizer, last.basis, len(view.batch), {}
        )
        moved = TrackedBasis(optax.apply_updates(last.basis, updates), state)
        known = jnp.any(last.basis != 0, axis=(-2, -1)) & jnp.any(projected != 0, axis=(-2, -1))
        return base.select(known & base.all_finite(moved, len(view.batch)), moved, last)

    return base.from_basis(
        rank,
        refresh,
        init=init,
        matrix_of=lambda tracked, view: tracked.basis,
        track=track,
        kept=TrackedBasis(0, basis_optimizer.init(jnp.zeros((1, 1)))),
        orthonormal=False,
        patterns=first_rule.patterns,
    )


def pca_gradient(
    basis: jax.Array, matrix: jax.Array, projected: jax.Array, penalty: float, view: View
) -> jax.Array:
    """The gradient ``[*batch, d, r]`` of the loss of `online_pca` in the basis, in closed form.

    ``-4 Y + 2 Y K + 2 P C + 4 λ (P K - P)`` with ``Y = G Rᵀ / s``, ``C = R Rᵀ / s``,
    ``K = PᵀP`` and ``s = ‖G‖²``: no product with a full-size result.
    """
    small = view.small_partition
    squares = jnp.square(matrix.astype(basis.dtype))
    norm = jnp.sqrt(jnp.sum(squares, axis=(-2, -1), keepdims=True))
    norm = jnp.where(norm == 0, 1, norm)
    right = (projected.mT if view.axis == -2 else projected) / norm  # [*batch, kept, r]
    y = base.times(matrix, right, view) / norm
    c = base.product("...kr,...ks->...rs", right, right, small)
    k = base.product("...dr,...ds->...rs", basis, basis, small)
    thin = lambda a, b: base.product("...dr,...rs->...ds", a, b, small)
    descent = -4 * y + 2 * thin(y, k) + 2 * thin(basis, c)
    return descent + 4 * penalty * (thin(basis, k) - basis)
