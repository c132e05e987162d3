"""NAG-GS: momentum as a semi-implicit Gauss-Seidel step of an accelerated gradient flow.

The state is the paper's v - x: it has the gradients' scale, so it can be quantized, and needs no
parameters.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.optimizers.nag_gs_quadratic import to_heavy_ball
from lowrank_optax.quantization import Bits
from lowrank_optax.states import LowBitState, in_float32
from lowrank_optax.states.arguments import refuse_unused
from lowrank_optax.states.assemble import has_no_decay, with_state_bits
from lowrank_optax.states.precision import keep_dtypes, scalar_dtype, to_float32, value_at


class ScaleByNagGsState(NamedTuple):
    """State of `scale_by_nag_gs`.

    Attributes:
      count: Number of updates so far, int32.
      gamma: Damping of the next update, a float32 scalar (float64 if a parameter is); ``()`` if it
        is constant.
      momentum: The paper's v - x in the parameters' shapes, in float32 (float64 for float64
        parameters) or ``state_dtype``.
    """

    count: Any
    gamma: Any
    momentum: Any


def scale_by_nag_gs(
    learning_rate: optax.ScalarOrSchedule,
    mu: float = 1.0,
    gamma: float = 1.0,
    constant_gamma: bool = False,
    *,
    paper_start: bool = False,
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The complete update of NAG-GS: no ``optax.scale_by_learning_rate`` may follow.

    The learning rate :math:`\alpha` enters the method nonlinearly. With momentum :math:`m`, zero at
    first, and gradient :math:`g`,

    .. math::
      m \leftarrow \frac{\gamma m - \alpha g}{(1 + \alpha)(\gamma + \alpha\mu)}, \qquad
      \gamma \leftarrow \frac{\gamma + \alpha\mu}{1 + \alpha}, \qquad
      x \leftarrow x + \alpha m.

    Arithmetic is float32 at least; updates have the gradients' dtype. Parameters are not needed.

    Args:
      learning_rate: Step :math:`\alpha` of the integrator, a float or an optax schedule; for the
        equivalent rate of gradient descent see `to_heavy_ball`.
      mu: Assumed strong convexity, above 0, which gamma converges to. With ``constant_gamma`` it
        may be 0.
      gamma: First :math:`\gamma`, above 0: the inertia of the flow.
      constant_gamma: Whether gamma stays constant (NAG4, and the official PyTorch code): the method
        is then gradient descent with the learning rate and momentum of `to_heavy_ball`.
      paper_start: Whether the first update only changes gamma, as in Algorithm 1 and the official
        JAX code, instead of a gradient step.
      state_dtype: Dtype of the momentum; None for the parameters', float32 at least. bfloat16 is
        safe. List it in the ``static_args`` of ``optax.inject_hyperparams``.

    Returns:
      A transformation with the state `ScaleByNagGsState`.

    Raises:
      ValueError: If ``learning_rate`` is negative, ``gamma`` not positive, or ``mu`` not positive
        (with ``constant_gamma``: negative).

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.scale_by_nag_gs(1.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([1.0, -2.0]), state)
      >>> print(updates)  # heavy ball with learning rate and momentum 1/4
      [-0.25  0.5 ]

    Reference:
      Leplat et al., NAG-GS: Semi-Implicit, Accelerated and Robust Stochastic Optimizer, 2022,
      https://arxiv.org/abs/2209.14937, Algorithm 1.
    """
    if isinstance(learning_rate, int | float) and not 0 <= learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate!r} must be a number of at least 0.")
    if isinstance(gamma, int | float) and not 0 < gamma < math.inf:
        raise ValueError(f"gamma={gamma!r} must be a number above 0.")
    if isinstance(mu, int | float) and constant_gamma and not 0 <= mu < math.inf:
        raise ValueError(f"mu={mu!r} must be a number of at least 0.")
    if isinstance(mu, int | float) and not constant_gamma and not 0 < mu < math.inf:
        raise ValueError(
            f"mu={mu!r} must be a number above 0, since gamma tends to it; with "
            "constant_gamma=True it may be 0."
        )

    def init_fn(params: optax.Params) -> ScaleByNagGsState:
        def zeros(p: jax.Array) -> jax.Array:
            default = jnp.promote_types(p.dtype, jnp.float32)
            return jnp.zeros_like(p, default if state_dtype is None else state_dtype)

        own_gamma = () if constant_gamma else jnp.array(gamma, scalar_dtype(params))
        return ScaleByNagGsState(jnp.zeros([], jnp.int32), own_gamma, jax.tree.map(zeros, params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleByNagGsState]:
        del params, extra_args
        dtype = scalar_dtype(updates)
        alpha = value_at(learning_rate, state.count, dtype)
        damping = jnp.asarray(gamma if constant_gamma else state.gamma, dtype)
        convexity = jnp.asarray(mu, dtype)
        scale = 1 / ((1 + alpha) * (damping + alpha * convexity))
        times = lambda factor, x: factor.astype(x.dtype) * x
        moved = jax.tree.map(
            lambda m, g: times(scale * damping, m) - times(scale * alpha, g),
            to_float32(state.momentum),
            to_float32(updates),
        )
        if paper_start:  # v still equals x
            moved = jax.tree.map(lambda m: jnp.where(state.count == 0, 0, m), moved)
        new = jax.tree.map(lambda m, g: times(alpha, m).astype(g.dtype), moved, updates)
        # As a difference: it converges to mu exactly.
        next_gamma = damping + alpha / (1 + alpha) * (convexity - damping)
        return new, ScaleByNagGsState(
            optax.safe_increment(state.count),
            () if constant_gamma else next_gamma.astype(state.gamma.dtype),
            optax.tree.cast_like(moved, state.momentum),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@explains_names
def nag_gs(
    learning_rate: optax.ScalarOrSchedule,
    mu: float = 1.0,
    gamma: float = 1.0,
    constant_gamma: bool = False,
    *,
    paper_start: bool = False,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    state_dtype: Any = None,
    state_bits: Bits | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NAG-GS: momentum whose best step on quadratics has a closed form, with half of Adam's state.

    It is a semi-implicit Gauss-Seidel step of size :math:`\alpha` of a damped accelerated flow:

    .. math::
      v \leftarrow \frac{\gamma v + \alpha\mu x - \alpha g(x)}{\gamma + \alpha\mu}, \qquad
      \gamma \leftarrow \frac{\gamma + \alpha\mu}{1 + \alpha}, \qquad
      x \leftarrow \frac{x + \alpha v}{1 + \alpha}.

    In other coordinates this is gradient descent with momentum: `to_heavy_ball` returns its
    learning rate and momentum, at which methods should be compared.

    Args:
      learning_rate: Step :math:`\alpha`, a float or an optax schedule. The official code has 0.05
        (JAX) or 0.01 (PyTorch), the official experiments 0.05 to 0.5.
      mu, constant_gamma, paper_start, state_dtype: As in `scale_by_nag_gs`.
      gamma: As in `scale_by_nag_gs`; the official code has 1.5 (JAX) or 1.0 (PyTorch).
      weight_decay: Decoupled decay, as in SGD with the learning rate of `to_heavy_ball`.
      weight_decay_mask: Which leaves decay, as ``mask`` of ``optax.adamw``.
      state_bits: Bits of the momentum between steps, 8 or 4: see `low_bit`; None for
        ``state_dtype``.

    Returns:
      The optimizer. It needs ``params`` only for weight decay.

    Raises:
      ValueError: As `scale_by_nag_gs`, and if ``state_bits`` is not 8, 4, 32 or None.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> best = lro.nag_gs_quadratic(mu=1.0, L=9.0, gamma=1.0)
      >>> tx = lro.nag_gs(best.learning_rate, mu=1.0, gamma=1.0)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(30):
      ...     updates, state = tx.update(jnp.array([1.0, 9.0]) * params, state)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{jnp.abs(params).max():.6f}")
      0.000000

    Reference:
      Leplat et al., NAG-GS: Semi-Implicit, Accelerated and Robust Stochastic Optimizer, 2022,
      https://arxiv.org/abs/2209.14937, Algorithm 1.
    """
    tx = scale_by_nag_gs(
        learning_rate, mu, gamma, constant_gamma, paper_start=paper_start, state_dtype=state_dtype
    )
    tx = with_state_bits(tx, state_bits)
    if has_no_decay(weight_decay):
        refuse_unused(nag_gs, f"weight_decay={weight_decay}", weight_decay_mask=weight_decay_mask)
        return tx

    tx = in_float32(tx)  # one rounding of the sum

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError(
                "nag_gs with weight_decay needs params: call tx.update(grads, state, params)."
            )
        new, after = tx.update(updates, state, params, **extra_args)
        before: Any = state.inner if isinstance(state, LowBitState) else state
        dtype = scalar_dtype(updates)
        alpha = value_at(learning_rate, before.count, dtype)
        rate = to_heavy_ball(alpha, mu, gamma if constant_gamma else before.gamma).learning_rate
        if paper_start:
            rate = jnp.where(before.count == 0, 0, rate)
        decay = optax.add_decayed_weights(
            -weight_decay * jnp.asarray(rate, dtype), weight_decay_mask
        )
        params = to_float32(params)
        return decay.update(new, decay.init(params), params)[0], after

    return keep_dtypes(optax.GradientTransformationExtraArgs(tx.init, update_fn))
