"""Grams and cautious AdamW: Adam's steps in directions that agree with the current gradient."""

from collections.abc import Callable
from typing import Any

import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.optimizers.gradient_direction import (
    MaskScale,
    direct,
    with_gradient_direction,
)
from lowrank_optax.quantization import Bits
from lowrank_optax.states.arguments import refuse_unused
from lowrank_optax.states.assemble import DecayPlacement, EpsPlacement, optimizer, scale_by_adam
from lowrank_optax.states.precision import in_float32


@explains_names
def grams(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    eps_placement: EpsPlacement = "before_bias_correction",
    bias_correction: bool = True,
    decay_placement: DecayPlacement = "before_step",
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: Any | None = None,
    state_bits: Bits | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Grams: steps of the size of Adam's, in the direction of the current gradient's sign.

    .. math::
      m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2,
      \qquad
      p \leftarrow p - \eta \left( \mathrm{sign}(g)
        \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{|m|}{\sqrt v + \epsilon} + \lambda p
      \right).

    Where the gradient is zero, only decay moves a parameter. State and arithmetic are float32
    (float64 for float64 parameters), two floats per parameter as in Adam.

    Args:
      learning_rate: A float or an optax schedule. The paper uses that of AdamW; the official
        default is 1e-3.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Term added to the root of the second moment.
      weight_decay: Decoupled decay :math:`\lambda`.
      eps_placement: Whether ``eps`` is added before bias correction, as in the official code and
        the formula above, or after it, as in the paper and ``optax.adam``.
      bias_correction: Whether the moments are corrected for their start at zero.
      decay_placement: Whether weights decay before or after the step: see `galore`.
      weight_decay_mask: Which leaves decay, as ``mask`` of ``optax.adamw``.
      mu_dtype: Dtype of the first moment; None for float32.
      state_bits: Bits of the moments between steps, 8 or 4: see `low_bit`; None for float32.

    Returns:
      The optimizer. It needs ``params`` only for weight decay.

    Raises:
      ValueError: If a placement is unknown, or ``b1`` or ``b2`` not in [0, 1).

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, numpy as np, optax
      >>> params, tx = jnp.array([1.0, -1.0, 0.5]), lro.grams(0.1)
      >>> state = tx.init(params)
      >>> for gradient in ([1.0, -2.0, 0.5], [-1.0, -2.0, 0.0], [-1.0, 1.0, 1e-5]):
      ...     updates, state = tx.update(jnp.array(gradient), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(np.asarray(params).round(4))
      [ 0.9 -0.9  0.4]
      [ 0.9053 -0.8     0.4   ]
      [ 0.9455 -0.8516  0.3482]

    Reference:
      Cao et al., Grams: Gradient Descent with Adaptive Momentum Scaling, 2024,
      https://arxiv.org/abs/2412.17107; the official code, https://github.com/Gunale0926/Grams.
    """
    if not bias_correction:
        refuse_unused(grams, "bias_correction=False", eps_placement=eps_placement)
    adam = scale_by_adam(b1, b2, eps, eps_placement, bias_correction, mu_dtype)
    scaled = with_gradient_direction(adam, "grams", along_gradient=True)
    return optimizer(
        in_float32(scaled),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        state_bits=state_bits,
        decay_placement=decay_placement,
    )


@explains_names
def cautious_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    scale: MaskScale = "mean_clamped",
    eps_placement: EpsPlacement = "before_bias_correction",
    bias_correction: bool = True,
    decay_placement: DecayPlacement = "before_step",
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: Any | None = None,
    state_bits: Bits | None = None,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Cautious AdamW: Adam's steps without the elements that point along the current gradient.

    .. math::
      p \leftarrow p - \eta \left( s \, \phi \, u + \lambda p \right), \qquad
      \phi = 1[u g > 0],

    with Adam's :math:`u` and the scale :math:`s` of `with_gradient_direction`. State and arithmetic
    are as in `grams`.

    Args:
      learning_rate: A float or an optax schedule.
      b1, b2, eps, eps_placement, bias_correction, mu_dtype, state_bits: As in `grams`.
      weight_decay: Decoupled decay :math:`\lambda`, which is not masked.
      scale: Factor of the remaining elements of a weight: ``"mean_clamped"``, ``"count_plus_one"``
        (the paper) or ``"none"``.
      decay_placement, weight_decay_mask: As in `grams`.
      weight_dimension_numbers: Which axes are those of stacked layers, each with its own scale: see
        `with_gradient_direction`.

    Returns:
      The optimizer. It needs ``params`` only for weight decay.

    Raises:
      ValueError: If ``scale`` or a placement is unknown, or ``b1`` or ``b2`` not in [0, 1).

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, numpy as np
      >>> tx = lro.cautious_adamw(0.1)
      >>> state = tx.init(jnp.zeros(2))
      >>> for gradient in ([1.0, 1.0], [1.0, -0.5]):
      ...     updates, state = tx.update(jnp.array(gradient), state)
      ...     print(np.asarray(updates).round(3))
      [-0.1 -0.1]
      [-0.2  0. ]

    Reference:
      Liang et al., Cautious Optimizers: Improving Training with One Line of Code, 2024,
      https://arxiv.org/abs/2411.16085, Algorithm 1; the official code,
      https://github.com/kyleliang919/C-Optim.
    """
    if not bias_correction:
        refuse_unused(cautious_adamw, "bias_correction=False", eps_placement=eps_placement)
    adam = scale_by_adam(b1, b2, eps, eps_placement, bias_correction, mu_dtype)
    first_moment = lambda state: state.mu
    scaled = direct(adam, "cautious", scale, True, weight_dimension_numbers, first_moment)
    return optimizer(
        in_float32(scaled),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        state_bits=state_bits,
        decay_placement=decay_placement,
    )
