"""NAG-GS on a quadratic in closed form, and its equivalent heavy ball."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp


class HeavyBall(NamedTuple):
    """The arguments of ``optax.sgd`` with the same iterates.

    Attributes:
      learning_rate: Factor of the momentum buffer.
      momentum: Decay of the buffer.
    """

    learning_rate: Any
    momentum: Any


class NagGsQuadratic(NamedTuple):
    """Result of `nag_gs_quadratic`.

    Attributes:
      learning_rate: Step with the fastest convergence.
      critical_learning_rate: Smallest step that diverges; infinite if all steps converge.
      spectral_radius: Asymptotic factor of the error per step at ``learning_rate``.
    """

    learning_rate: float
    critical_learning_rate: float
    spectral_radius: float


def to_heavy_ball(learning_rate: Any, mu: Any, gamma: Any) -> HeavyBall:
    r"""The learning rate and momentum of the gradient descent that is equivalent to NAG-GS.

    With the step :math:`\alpha` and a constant :math:`\gamma`, the iterates are exactly those of
    ``optax.sgd(learning_rate, momentum)`` with

    .. math::
      \eta = \frac{\alpha^2}{(1 + \alpha)(\gamma + \alpha\mu)}, \qquad
      \beta = \frac{\gamma}{(1 + \alpha)(\gamma + \alpha\mu)}, \qquad
      \frac{\eta}{1 - \beta} = \frac{\alpha}{\mu + \gamma + \alpha\mu}.

    The last is the long-run step of a constant gradient. If gamma changes, these are the values of
    the step that begins with it.

    Args:
      learning_rate: Step :math:`\alpha`; all three may be numbers or arrays.
      mu: As in `nag_gs`.
      gamma: As in `nag_gs`; ``gamma=mu`` is the limit if gamma is not constant.

    Returns:
      A `HeavyBall`, of the arguments' broadcast shape.

    Example:
      >>> import lowrank_optax as lro
      >>> ball = lro.to_heavy_ball(0.1, mu=1e-4, gamma=1.0)
      >>> print(f"{ball.learning_rate:.4f} {ball.momentum:.3f}")
      0.0091 0.909
    """
    scale = 1 / ((1 + learning_rate) * (gamma + learning_rate * mu))
    return HeavyBall(learning_rate * learning_rate * scale, gamma * scale)


def nag_gs_quadratic(mu: float, L: float, gamma: float) -> NagGsQuadratic:
    r"""The best and the largest step of NAG-GS on a quadratic, with a constant gamma.

    For eigenvalues in :math:`[\mu, L]`, and :math:`\mu` the method's own,

    .. math::
      \alpha_c = \frac{\mu + \gamma + \sqrt{(\mu + \gamma)^2 + 4 \gamma c}}{c}

    is the step of fastest convergence for :math:`c = L - \mu`, and the largest one that converges
    for :math:`c = L - 2\mu` (if that is not positive, every step converges). The former has the
    spectral radius :math:`1 / \min(1 + \alpha, 1 + \alpha\mu/\gamma)`.

    Args:
      mu: Smallest eigenvalue, above 0.
      L: Largest eigenvalue, at least ``mu``.
      gamma: As in `nag_gs`, above 0.

    Returns:
      A `NagGsQuadratic` of floats. If ``L == mu`` the best step is infinite and the radius 0.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import lowrank_optax as lro
      >>> best = lro.nag_gs_quadratic(mu=1.0, L=9.0, gamma=1.0)
      >>> print(best.learning_rate, f"{best.critical_learning_rate:.4f}", best.spectral_radius)
      1.0 1.0938 0.5

    Reference:
      Leplat et al., NAG-GS, 2022, https://arxiv.org/abs/2209.14937; the page on NAG-GS derives the
      best step for any gamma.
    """
    if not 0 < mu < math.inf:
        raise ValueError(f"mu={mu!r} must be a number above 0.")
    if not mu <= L < math.inf:
        raise ValueError(f"L={L!r} must be a number of at least mu, which is {mu!r}.")
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma={gamma!r} must be a number above 0.")

    def step(c: float) -> float:
        total = mu + gamma
        return math.inf if c <= 0 else (total + math.sqrt(total**2 + 4 * gamma * c)) / c

    best = step(L - mu)
    return NagGsQuadratic(best, step(L - 2 * mu), 1 / (1 + best * min(1, mu / gamma)))


def nag_gs_stationary_variance(
    learning_rate: Any, mu: Any, gamma: Any, curvature: Any, noise: Any
) -> Any:
    r"""The stationary variance of the iterates of NAG-GS with noisy gradients.

    Along an eigenvector of a quadratic with eigenvalue :math:`\lambda`, with a constant gamma and
    independent gradient noise of standard deviation :math:`\sigma_g`,

    .. math::
      \mathrm{Var}\, x = \frac{\eta \, \sigma_g^2 (1 + \beta)}
        {(1 - \beta) \lambda \, (2 (1 + \beta) - \eta \lambda)}

    with :math:`\eta, \beta` of `to_heavy_ball`.

    Args:
      learning_rate: Step :math:`\alpha`; all arguments may be numbers or arrays.
      mu, gamma: As in `nag_gs`.
      curvature: Eigenvalue :math:`\lambda`, above 0.
      noise: Standard deviation :math:`\sigma_g`.

    Returns:
      A float32 array of the broadcast shape; infinite where the step is unstable.

    Example:
      >>> from lowrank_optax.optimizers import nag_gs_stationary_variance
      >>> variance = nag_gs_stationary_variance(1.0, mu=1.0, gamma=1.0, curvature=3.0, noise=1.0)
      >>> print(f"{variance:.4f} = 5/63")
      0.0794 = 5/63
    """
    rate, beta = to_heavy_ball(learning_rate, mu, gamma)
    room = 2 * (1 + beta) - rate * curvature
    variance = rate * noise**2 * (1 + beta) / ((1 - beta) * curvature * room)
    return jnp.where(room > 0, variance, jnp.inf)
