"""Residual rules that scale the gradient as the inner optimizer scaled its projection.

Each column (each row, where columns are compressed) has a factor: the norm of the inner optimizer's
answer over that of the projected gradient. Fira scales the part outside the subspace by it, APOLLO
the whole gradient. Both limit how fast the norm of the result may grow.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lowrank_optax.projection.limiter import growth_factor
from lowrank_optax.projection.residuals.base import Residual, Step
from lowrank_optax.projection.view import View, zeros_per_matrix

_TINY = 1e-8

Granularity = Literal["channel", "tensor"]


def fira(
    gamma: float = 1.01,
    form: Literal["code", "paper"] = "paper",
    decays: tuple[float, float] | None = None,
    granularity: Granularity = "channel",
    floor: float = 0.0,
) -> Residual:
    r"""Adds the residual, each column scaled as the inner optimizer scaled the projection: Fira.

    .. math::
      \phi_j = \lVert N_j \rVert / \lVert R_j \rVert, \qquad S = (G - P R) \, \mathrm{diag}(\phi)

    and the update is :math:`\alpha (P N + S)` after the growth of :math:`\lVert S \rVert_F` is
    limited. In the official code, which made the paper's numbers, the residual is
    :math:`G - \alpha P R`, and ``S`` is not multiplied by :math:`\alpha`, so that it is
    :math:`1/\alpha` times larger outside the subspace. The state is one float per matrix.

    Args:
      gamma: Largest growth of the residual's norm from step to step; ``inf`` for no limit.
      form: ``"paper"`` or ``"code"``.
      decays: Decays ``(b1, b2)`` of an inner Adam, to limit norms without bias correction as the
        official code does; None limits the norms that are applied.
      granularity: ``"channel"``, a factor for each column, or ``"tensor"``, one for the matrix.
      floor: Least share of a column's whole norm that its projected norm is taken to be, against
        huge factors where a gradient lies outside the subspace. The official code has 0; 1e-3 is
        safe.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, numpy as np, optax
      >>> tx = lro.scale_by_projection(
      ...     optax.scale(0.5), lro.subspaces.svd(1), residual=lro.residuals.fira()
      ... )
      >>> gradient = {"kernel": jnp.array([[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]])}
      >>> print(np.asarray(tx.update(gradient, tx.init(gradient))[0]["kernel"]).round(3) + 0)
      [[1.5 2.  0. ]
       [0.5 1.  1. ]]

    Reference:
      Chen et al., Fira, 2024, https://arxiv.org/abs/2410.01623, Algorithm 1 and Appendix B.
    """
    _check(gamma, granularity)
    if form not in ("code", "paper"):
        raise ValueError(f"form={form!r} must be 'code' or 'paper'.")
    if not 0 <= floor < 1:
        raise ValueError(f"floor={floor!r} must be at least 0 and below 1.")

    def update(previous: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        matrix = step.gradient()
        least = floor * _norms(matrix, step.view, granularity) if floor else 0.0
        factors = _factors(step, granularity, least)
        inside = step.scale if form == "code" else 1.0
        # Formed for its norm: the difference of squared norms would cancel where it is small.
        lost = _norms(matrix - inside * step.lift(step.projected), step.view, granularity)
        norm = jnp.sqrt(jnp.sum((factors * lost) ** 2, axis=(-2, -1)))
        limit, previous = _limited(norm, previous, gamma, decays, step.count)
        factors = factors * limit[..., None, None]
        outside = factors if form == "code" else step.scale * factors
        # One product lifts both: P (α N - α R φ) + G φ.
        lifted = step.lift(step.scale * (step.answer - step.projected * factors))
        return lifted + matrix * outside, previous

    return Residual(update, _zero_norms, needs_one_side=True)


def gradient_scaling(
    gamma: float = 1.01,
    decays: tuple[float, float] | None = None,
    granularity: Granularity = "channel",
) -> Residual:
    r"""Applies the gradient, each column scaled as the inner optimizer scaled it: APOLLO.

    .. math::
      s_j = \lVert N_j \rVert / \lVert R_j \rVert, \qquad S = G \, \mathrm{diag}(s)

    with the growth of :math:`\lVert S \rVert_F` limited, times the transformation's ``scale``.
    Nothing is lifted: a step takes one product, and the update has full rank. The state is one
    float per matrix.

    Args:
      gamma: Largest growth of the update's norm from step to step; ``inf`` for no limit.
      decays: See `fira`.
      granularity: See `fira`; ``"tensor"`` is APOLLO-Mini's.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.scale_by_projection(
      ...     optax.scale(0.5),
      ...     lro.subspaces.random(2),
      ...     residual=lro.residuals.gradient_scaling(),
      ... )
      >>> gradient = {"kernel": jnp.ones((4, 6))}
      >>> tx.update(gradient, tx.init(gradient))[0]["kernel"][0, 0].round(3).item()
      0.5

    Reference:
      Zhu et al., APOLLO: SGD-like Memory, AdamW-level Performance, 2024,
      https://arxiv.org/abs/2412.05270, Algorithm 1.
    """
    _check(gamma, granularity)

    def update(previous: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        matrix = step.gradient()
        factors = _factors(step, granularity, 0.0)
        whole = _norms(matrix, step.view, granularity)
        norm = jnp.sqrt(jnp.sum((factors * whole) ** 2, axis=(-2, -1)))
        limit, previous = _limited(norm, previous, gamma, decays, step.count)
        return matrix * (step.scale * factors * limit[..., None, None]), previous

    return Residual(update, _zero_norms, needs_one_side=True)


def _zero_norms(view: View) -> jax.Array:
    return zeros_per_matrix(view, view.dtype)


def _check(gamma: Any, granularity: Any) -> None:
    if isinstance(gamma, int | float) and gamma <= 0:
        raise ValueError(f"gamma={gamma!r} must be positive.")
    if granularity not in ("channel", "tensor"):
        raise ValueError(f"granularity={granularity!r} must be 'channel' or 'tensor'.")


def _norms(x: jax.Array, view: View, granularity: Granularity) -> jax.Array:
    """Norms over the compressed axis, or over both, which stay with size one."""
    axes = view.axis if granularity == "channel" else (-2, -1)
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))


def _factors(step: Step, granularity: Granularity, least: jax.Array | float) -> jax.Array:
    answer = _norms(step.answer, step.view, granularity)
    projected = _norms(step.projected, step.view, granularity)
    return answer / (jnp.maximum(projected, least) + _TINY)


def _limited(
    norm: jax.Array,
    previous: jax.Array,
    gamma: float,
    decays: tuple[float, float] | None,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    if decays is not None:
        b1, b2 = decays
        steps = (count + 1).astype(norm.dtype)  # outside of a jit each whole power is compiled
        norm = norm * (1 - b1**steps) / jnp.sqrt(1 - b2**steps)
    return growth_factor(norm, previous, gamma)
