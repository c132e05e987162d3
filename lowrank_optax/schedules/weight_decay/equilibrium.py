"""Where weight decay leads: norm and rotation of scale-invariant weights in equilibrium."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

Optimizer = Literal["adamw", "sgd", "sgdw"]


class Equilibrium(NamedTuple):
    """What `equilibrium` predicts, in float32.

    Attributes:
      norm: Norm of the weights; infinite without decay.
      rotation: Angle between the weights before and after a step, in radians.
      relaxation_steps: Steps in which the norm comes closer by a factor of e; a rough figure.
    """

    norm: jax.Array
    rotation: jax.Array
    relaxation_steps: jax.Array


def equilibrium(
    optimizer: Optimizer,
    learning_rate: Any,
    weight_decay: Any,
    *,
    momentum: Any = None,
    size: Any = 1,
    unit_gradient_norm: Any = 1.0,
) -> Equilibrium:
    r"""Norm and rotation per step at which decay and random gradients hold the balance.

    For weights of :math:`C` elements on whose scale the loss does not depend (those before a norm),
    with momentum :math:`a` and :math:`\tilde g` the gradient at :math:`w / \lVert w \rVert`:

    ============== ====================================== ==========================================
    ``optimizer``  norm                                   rotation
    ============== ====================================== ==========================================
    ``"sgd"``      :math:`\lVert w \rVert^4 = \eta        :math:`\arccos(1 - \eta\lambda / (1 + a))`
                   \lVert\tilde g\rVert^2 / (\lambda
                   (1-a) (2 - \eta\lambda/(1+a)))`
    ``"sgdw"``     :math:`\lVert w \rVert^4 = \eta        :math:`\sqrt{2\eta\lambda (1-a)/(1+a)}`
                   \lVert\tilde g\rVert^2 / (2 \lambda
                   (1-a)^2)`
    ``"adamw"``    :math:`\lVert w \rVert^2 =             :math:`\sqrt{2\eta\lambda (1-a)/(1+a)}`
                   \eta C / (2\lambda)`
    ============== ====================================== ==========================================

    ``"sgd"`` has the decay inside the momentum, as ``optax.add_decayed_weights`` before
    ``optax.sgd`` and PyTorch; ``"sgdw"`` after it, as `add_weight_decay`. All are limits of small
    :math:`\eta\lambda` except those of ``"sgd"``, which are exact in mean squares; AdamW's norm
    comes out 2.6 % lower at :math:`\eta\lambda = 0.005` and 4.6 % at 0.01.

    Args:
      optimizer: One of the above.
      learning_rate: :math:`\eta > 0`, a number or an array.
      weight_decay: :math:`\lambda \ge 0`, where a step multiplies weights by
        :math:`1 - \eta\lambda`.
      momentum: :math:`a`, for AdamW ``b1``; None for 0.9 with AdamW and 0 otherwise.
      size: :math:`C`, the number of elements (AdamW).
      unit_gradient_norm: :math:`\lVert\tilde g\rVert = \lVert g \rVert \lVert w \rVert` (SGD).

    Returns:
      An `Equilibrium`.

    Raises:
      ValueError: If the optimizer is none of the above, or a rate negative.

    Example:
      >>> import lowrank_optax as lro
      >>> norm, rotation, steps = lro.schedules.equilibrium("adamw", 0.01, 0.1, size=2000)
      >>> print(f"{norm:.2f} {rotation:.5f} {steps:.0f}")
      10.00 0.01026 500

    Reference:
      Kosson et al., Rotational Equilibrium: How Weight Decay Balances Learning Across Neural
      Networks, 2023, https://arxiv.org/abs/2305.17212, Table 1.
    """
    check_optimizer(optimizer, momentum)
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"{name}={value} must be a number ≥ 0.")
    rate, decay, a, size, gradient = (
        jnp.asarray(x, jnp.float32)
        for x in (
            learning_rate,
            weight_decay,
            momentum_of(optimizer, momentum),
            size,
            unit_gradient_norm,
        )
    )
    shrinkage = rate * decay
    none = shrinkage == 0
    safe = jnp.where(none, 1.0, decay)
    if optimizer == "sgd":
        turn = shrinkage / (1 + a)
        norm = (rate * gradient**2 / (safe * (1 - a) * (2 - turn))) ** 0.25
        rotation = 2 * jnp.arcsin(jnp.sqrt(turn / 2))  # arccos(1 - turn), without cancellation
        relaxation = (1 - a) / 4
    elif optimizer == "sgdw":
        norm = (rate * gradient**2 / (2 * safe)) ** 0.25 / jnp.sqrt(1 - a)
        rotation = jnp.sqrt(2 * shrinkage * (1 - a) / (1 + a))
        relaxation = 0.25
    else:
        norm = jnp.sqrt(rate * size / (2 * safe))
        rotation = jnp.sqrt(2 * shrinkage * (1 - a) / (1 + a))
        relaxation = 0.5
    steps = relaxation / jnp.where(none, 1.0, shrinkage)
    return Equilibrium(jnp.where(none, jnp.inf, norm), rotation, jnp.where(none, jnp.inf, steps))


def momentum_of(optimizer: Optimizer, momentum: Any) -> Any:
    """The momentum, or what it is by default: 0.9 for AdamW, else 0."""
    if momentum is not None:
        return momentum
    return 0.9 if optimizer == "adamw" else 0.0


def check_optimizer(optimizer: str, momentum: Any) -> None:
    """Raises ValueError if there is no prediction for it."""
    if optimizer not in get_args(Optimizer):
        raise ValueError(f"optimizer={optimizer!r} must be one of {get_args(Optimizer)}.")
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must lie in [0, 1).")
