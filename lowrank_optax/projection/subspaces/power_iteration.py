"""One warm power iteration for each refresh: LDAdam's rule, cheap enough for every step."""

import jax
import jax.numpy as jnp

from lowrank_optax.matrices.branching import branch
from lowrank_optax.matrices.orthonormal import orthonormalize
from lowrank_optax.projection.rank import RankSpec
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.view import View


def power_iteration(
    rank: RankSpec, momentum: float = 0.908, initial: base.Subspace | None = None
) -> base.Subspace:
    r"""Subspace that follows the gradient and its momentum by one power iteration a refresh.

    With the last basis :math:`P` and the bias-corrected first moment :math:`\hat M` in it,

    .. math::
      B = \rho \, P \hat M + (1 - \rho) \, G, \qquad P \leftarrow \mathrm{orth}(B B^\top P).

    ``B`` is never formed: two products with the gradient and small ones. Without a first moment in
    the inner optimizer's state, :math:`\rho = 0`.

    Args:
      rank: Number of directions; at most the smaller side of each matrix.
      momentum: The weight :math:`\rho` of the momentum.
      initial: Rule of the first basis; None for one power iteration from a Gaussian (LDAdam's code:
        an exact SVD).

    Raises:
      TypeError: If ``rank`` is none.
      ValueError: If ``rank`` is below 1, or ``momentum`` not in [0, 1); if ``initial`` is not
        orthonormal, keeps other things than one array of floats, or (when the optimizer's state is
        made) has another rank.

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
    moment = moment.mT if view.axis == -2 else moment  # [*batch, kept, r]
    # Scaled, or squares of tiny gradients would underflow.
    back = (weight * moment + (1 - weight) * back) / base.largest_entry(back)
    inside = base.product("...kr,...ks->...rs", moment, back, small)
    lifted = base.product("...dr,...rs->...ds", basis, inside, small)
    return weight * lifted + (1 - weight) * base.times(matrix, back, view)
