"""Predicted norm and rotation of scale-invariant weights in equilibrium with weight decay."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lowrank_optax.training.weight_decay import check_rate

Optimizer = Literal["adamw", "sgd", "sgdw"]


class Equilibrium(NamedTuple):
    """Predictions of `equilibrium`, in float32.

    Attributes:
      norm: Norm of the weights; infinite without decay.
      rotation: Angle between the weights before and after a step, in radians.
      relaxation_steps: Approximate number of steps that bring the norm closer by a factor of e.
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
    r"""Norm and rotation per step at which weight decay and random gradients balance.

    For :math:`C` weights whose scale does not change the loss (those before a norm), with momentum
    :math:`a` and the gradient :math:`\tilde g` at :math:`w / \lVert w \rVert`:

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

    ``"sgd"`` applies decay before momentum, as PyTorch or ``optax.add_decayed_weights`` before
    ``optax.sgd`` does; ``"sgdw"`` after it, as `add_weight_decay`. The formulas of ``"sgd"`` are
    exact in mean squares, the others hold for small :math:`\eta\lambda`: AdamW's norm is 2.6 %
    lower at :math:`\eta\lambda = 0.005` and 4.6 % at 0.01.

    Args:
      optimizer: One of the above.
      learning_rate: Learning rate :math:`\eta > 0`, a number or an array.
      weight_decay: Weight decay :math:`\lambda \ge 0`, where a step multiplies weights by
        :math:`1 - \eta\lambda`.
      momentum: Momentum :math:`a`, ``b1`` for AdamW; None for 0.9 with AdamW and 0 otherwise.
      size: Number of elements :math:`C` (AdamW).
      unit_gradient_norm: :math:`\lVert\tilde g\rVert = \lVert g \rVert \lVert w \rVert` (SGD).

    Raises:
      ValueError: If the optimizer is not one of the above, a rate is negative, or ``momentum`` is
        not in [0, 1).

    Example:
      >>> import lowrank_optax as lro
      >>> norm, rotation, steps = lro.training.equilibrium("adamw", 0.01, 0.1, size=2000)
      >>> print(f"{norm:.2f} {rotation:.5f} {steps:.0f}")
      10.00 0.01026 500

    Reference:
      Kosson et al., Rotational Equilibrium: How Weight Decay Balances Learning Across Neural
      Networks, 2023, https://arxiv.org/abs/2305.17212, Table 1.
    """
    check_optimizer(optimizer, momentum)
    check_rate("learning_rate", learning_rate)
    check_rate("weight_decay", weight_decay)
    a = momentum_of(optimizer, momentum)
    numbers = (learning_rate, weight_decay, a, size, unit_gradient_norm)
    rate, decay, a, size, gradient = (jnp.asarray(x, jnp.float32) for x in numbers)
    shrinkage = rate * decay
    is_zero = shrinkage == 0
    safe = jnp.where(is_zero, 1.0, decay)
    rotation = jnp.sqrt(2 * shrinkage * (1 - a) / (1 + a))
    if optimizer == "sgd":
        x = shrinkage / (1 + a)
        norm = (rate * gradient**2 / (safe * (1 - a) * (2 - x))) ** 0.25
        rotation = 2 * jnp.arcsin(jnp.sqrt(x / 2))  # arccos(1 - x), without cancellation
        relaxation = (1 - a) / 4
    elif optimizer == "sgdw":
        norm = (rate * gradient**2 / (2 * safe)) ** 0.25 / jnp.sqrt(1 - a)
        relaxation = 0.25
    else:
        norm = jnp.sqrt(rate * size / (2 * safe))
        relaxation = 0.5
    steps = relaxation / jnp.where(is_zero, 1.0, shrinkage)
    infinite = lambda x: jnp.where(is_zero, jnp.inf, x)
    return Equilibrium(infinite(norm), rotation, infinite(steps))


def momentum_of(optimizer: Optimizer, momentum: Any) -> Any:
    """The momentum, or its default: 0.9 for AdamW, else 0."""
    default = 0.9 if optimizer == "adamw" else 0.0
    return default if momentum is None else momentum


def check_optimizer(optimizer: str, momentum: Any) -> None:
    """Refuses an unknown optimizer and momenta that are out of range."""
    if optimizer not in get_args(Optimizer):
        raise ValueError(f"optimizer={optimizer!r} must be one of {get_args(Optimizer)}.")
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must lie in [0, 1).")
