"""Bases that follow the gradient: by one warm power iteration a refresh, or by online PCA."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices.arithmetic import branch
from lowrank_optax.matrices.orthonormal import orthonormalize
from lowrank_optax.projection.inner_moments import init_one
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.subspaces.singular_vectors import randomized_svd
from lowrank_optax.projection.view import RankSpec, View, over_batch
from lowrank_optax.states.arguments import transformation


def power_iteration(
    rank: RankSpec, momentum: float = 0.908, initial: base.Subspace | None = None
) -> base.Subspace:
    r"""Subspace that follows gradient and momentum by one power iteration per refresh (LDAdam).

    With the last basis :math:`P` and the bias-corrected first moment :math:`\hat M` in it,

    .. math::
      B = \rho \, P \hat M + (1 - \rho) \, G, \qquad P \leftarrow \mathrm{orth}(B B^\top P).

    ``B`` is never formed: that takes two products with the gradient and small ones. If the inner
    optimizer has no first moment, :math:`\rho = 0`.

    Args:
      rank: Number of directions; at most the smaller side of each matrix.
      momentum: Weight :math:`\rho` of the momentum.
      initial: Rule for the first basis; None for one power iteration from a Gaussian (LDAdam's
        code: an exact SVD).

    Raises:
      TypeError: If `rank` is of another type.
      ValueError: If `rank` is below 1, or `momentum` not in [0, 1); if `initial` is not
        orthonormal, does not store one array of floats, or (in ``init``) has another rank.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> rule, gradient = lro.subspaces.power_iteration(1), jnp.diag(jnp.array([3.0, 1.0]))
      >>> view, key = lro.View.of(gradient, axis=-2, rank=rule.rank), jax.random.key(0)
      >>> basis = jnp.full((2, 1), 0.5**0.5)
      >>> for _ in range(4):
      ...     basis = rule.refresh(key, gradient, basis, None, view)
      >>> print(jnp.abs(basis).ravel().round(3))
      [1. 0.]

    Reference:
      Robert et al., LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics, 2024,
      https://arxiv.org/abs/2410.16103, Algorithm 1 and section 3.
    """
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r} must be at least 0 and below 1.")

    def refresh(
        key: jax.Array, matrix: jax.Array, basis: jax.Array, moment: jax.Array | None, view: View
    ) -> jax.Array:
        first = jnp.all(basis == 0, axis=(-2, -1))
        start = jax.random.normal(key, (view.length, basis.shape[-1]), basis.dtype)
        start = jnp.where(first[..., None, None], start, basis)
        y = _iterated(matrix, start, moment, momentum, view)
        found = orthonormalize(y)
        if initial is not None:
            begin = lambda: base.first_basis(initial, key, matrix, basis, view)
            chosen = lambda: base.select(first, begin(), found)
            found = branch(jnp.any(first), chosen, lambda: found)
        return base.agreeing(found, basis)

    init = None if initial is None else base.zero_basis_before(initial)
    if initial is not None and not initial.orthonormal:
        raise ValueError("initial must be orthonormal, as the bases that follow are.")
    patterns = {} if initial is None else initial.patterns
    return base.from_basis(rank, refresh, init=init, follow_momentum=True, patterns=patterns)


def _iterated(
    matrix: jax.Array, basis: jax.Array, moment: jax.Array | None, weight: float, view: View
) -> jax.Array:
    """``B Bᵀ P`` for the blend ``B`` of momentum and gradient, from its two factors."""
    small = view.small_partition
    back = base.times(matrix, basis, view, across=True)
    if moment is None:
        return base.times(matrix, base.scaled(back), view)
    moment = moment.mT if view.axis == -2 else moment  # [*batch, k, r]
    # Scaled, or squares of tiny gradients would underflow.
    back = (weight * moment + (1 - weight) * back) / base.largest_entry(back)
    inside = base.product("...kr,...ks->...rs", moment, back, small)
    lifted = base.product("...dr,...rs->...ds", basis, inside, small)
    return weight * lifted + (1 - weight) * base.times(matrix, back, view)


class TrackedBasis(NamedTuple):
    """The basis of `online_pca`, and the state of the optimizer that moves it.

    Attributes:
      basis: Nearly orthonormal basis ``[*batch, d, r]``, float32.
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
    r"""Subspace that is trained with the model, by one step of online PCA after every step.

    With :math:`A = G / \lVert G \rVert_F`, the basis descends

    .. math::
      L(P) = \lVert P P^\top A - A \rVert_F^2 + \lambda \lVert P^\top P - I \rVert_F^2

    whose gradient needs one product with ``G`` besides ``PᵀG``, which the step computes anyway.
    Nothing is decomposed after the first step, and all steps cost the same: use it with
    ``refresh_every=None``. The basis is only nearly orthonormal, but lifting is the exact transpose
    of projecting, as the convergence proof requires.

    Args:
      rank: Number of directions; at most the smaller side of each matrix.
      optimizer: Elementwise optax optimizer of the basis; ``optax.adam(0.005)`` if None (the
        paper's rate, 5 times 0.001).
      penalty: Weight :math:`\lambda`; the official code has no such term (0).
      initial: Rule for the first basis; ``randomized_svd(rank)`` if None (the code: exact SVD).

    Raises:
      TypeError: If `rank` is of another type.
      ValueError: If `rank` is below 1, or `penalty` below 0; if `initial` does not store one array
        of floats, or (in ``init``) has another rank.

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
        update = over_batch(basis_optimizer.update, len(view.batch))
        updates, state = update(gradient, last.optimizer, last.basis)
        moved = TrackedBasis(optax.apply_updates(last.basis, updates), state)
        known = jnp.any(last.basis != 0, axis=(-2, -1)) & jnp.any(projected != 0, axis=(-2, -1))
        return base.select(known & base.all_finite(moved, len(view.batch)), moved, last)

    return base.from_basis(
        rank,
        refresh,
        init=init,
        matrix_of=lambda tracked, view: tracked.basis,
        track=track,
        example=TrackedBasis(0, basis_optimizer.init(jnp.zeros((1, 1)))),
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
    right = (projected.mT if view.axis == -2 else projected) / norm  # [*batch, k, r]
    y = base.times(matrix, right, view) / norm
    c = base.product("...kr,...ks->...rs", right, right, small)
    k = base.product("...dr,...ds->...rs", basis, basis, small)
    thin = lambda a, b: base.product("...dr,...rs->...ds", a, b, small)
    descent = -4 * y + 2 * thin(y, k) + 2 * thin(basis, c)
    return descent + 4 * penalty * (thin(basis, k) - basis)
