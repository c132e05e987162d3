"""Residual rules without a state: drop it, add it as it is, or add its signs."""

import jax
import jax.numpy as jnp

from lowrank_optax.projection.residuals.base import Residual, Step


def drop() -> Residual:
    """Nothing outside the subspace is applied: GaLore.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.scale_by_projection(
      ...     optax.identity(), lro.subspaces.fixed(jnp.eye(2, 1)), side="rows", residual="drop"
      ... )
      >>> gradient = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> tx.update(gradient, tx.init(gradient))[0]["kernel"].tolist()
      [[1.0, 2.0], [0.0, 0.0]]

    Reference:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, Algorithm 1.
    """
    return Residual(
        lambda state, step: (step.lift(step.scale * step.answer), state), needs_gradient=False
    )


def raw(factor: float = 1.0) -> Residual:
    """The residual itself, times ``factor``: plain gradient descent outside the subspace (SUMO).

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.scale_by_projection(
      ...     optax.identity(), lro.subspaces.fixed(jnp.eye(2, 1)), side="rows", residual="raw"
      ... )
      >>> gradient = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> tx.update(gradient, tx.init(gradient))[0]["kernel"].tolist()
      [[1.0, 2.0], [3.0, 4.0]]

    Reference:
      Refael et al., SUMO, 2025, https://arxiv.org/abs/2505.24749, Algorithm 1.
    """

    def update(state: object, step: Step) -> tuple[jax.Array, object]:
        inside = step.lift(step.scale * step.answer - factor * step.projected)
        return inside + factor * step.gradient(), state

    return Residual(update)


def sign(factor: float = 1.0) -> Residual:
    """The signs of the residual, times ``factor``: sign descent outside the subspace (FRUGAL).

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.scale_by_projection(
      ...     optax.identity(), lro.subspaces.fixed(jnp.eye(2, 1)), side="rows", residual="sign"
      ... )
      >>> gradient = {"kernel": jnp.array([[1.0, 2.0], [3.0, -4.0]])}
      >>> tx.update(gradient, tx.init(gradient))[0]["kernel"].tolist()
      [[1.0, 2.0], [1.0, -1.0]]

    Reference:
      Zmushko et al., FRUGAL, 2024, https://arxiv.org/abs/2411.07837, Algorithm 1.
    """

    def update(state: object, step: Step) -> tuple[jax.Array, object]:
        outside = jnp.sign(step.gradient() - step.lift(step.projected))
        return step.lift(step.scale * step.answer) + factor * outside, state

    return Residual(update)
