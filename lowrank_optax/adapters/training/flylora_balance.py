"""FlyLoRA's balance: the bias of a rank that too many tokens use falls."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.adapters.training.leaf_names import all_but, are_named, check_any_named
from lowrank_optax.states.arguments import transformation

_BIAS = ("balance_bias",)
# Excesses below this share of the largest are rounding errors: the sum of a balanced rank's.
_ROUNDING = 1e-5


def flylora_balance(
    inner: optax.GradientTransformation, step: float = 1e-3
) -> optax.GradientTransformationExtraArgs:
    r"""``inner``, with `FlyLoRA`'s leaves ``balance_bias`` moved by the paper's balancing rule.

    .. math::
      d_i \leftarrow d_i + u \, \mathrm{sign}(\bar c - c_i), \qquad \mathrm{sign}(0) = 0,

    with :math:`c_i` the tokens of the step that use rank :math:`i`. The gradient of ``d`` is
    :math:`(c_i - \bar c)` per token, so counts are summed over micro-batches and devices as
    gradients are, and tokens without a part in the loss, such as padding, are not counted. An
    excess below 1e-5 of the layer's largest is the rounding of zero. A gradient that is not finite
    moves nothing.

    ``inner`` does not see these leaves. Put clipping by the global norm and weight decay into it:
    around it, clipping would count them. Put ``optax.MultiSteps`` around it. An optimizer without
    this transformation treats ``d`` as any parameter: Adam also lowers the bias of overused ranks,
    by about its learning rate, and weight decay shrinks it.

    Args:
      inner: Any optax transformation, with its learning rate.
      step: The paper's :math:`u`, by which a bias moves in each update.

    Returns:
      A transformation with the state of ``optax.masked(inner, ...)``.

    Raises:
      ValueError: If ``step`` is negative or not finite; in ``init``, if no leaf is named
        ``balance_bias``.
      TypeError: If ``inner`` is not a transformation.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = {"B": jnp.zeros((3, 1)), "balance_bias": jnp.zeros(3)}
      >>> tx = lro.adapters.flylora_balance(optax.sgd(1.0))
      >>> gradient = {"B": jnp.ones((3, 1)), "balance_bias": jnp.array([0.5, 0.0, -0.25])}
      >>> updates, _ = tx.update(gradient, tx.init(params))
      >>> print(updates["balance_bias"], updates["B"].T)
      [-0.001  0.     0.001] [[-1. -1. -1.]]

    Reference:
      FlyLoRA, 2025, https://arxiv.org/abs/2510.08396.
    """
    if isinstance(step, int | float) and not 0 <= step < float("inf"):
        raise ValueError(f"step={step!r} must be finite and not negative.")
    inner = optax.masked(transformation("inner", inner), all_but(_BIAS))

    def init_fn(params: optax.Params) -> Any:
        advice = "attach FlyLoRA with active below its rank, and take gradients of all its arrays."
        check_any_named(params, _BIAS, advice)
        return inner.init(params)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        updates, state = inner.update(updates, state, params, **extra_args)

        def balanced(is_bias: bool, update: jax.Array) -> jax.Array:
            return (step * _sign(-update)).astype(update.dtype) if is_bias else update

        return jax.tree.map(balanced, are_named(updates, _BIAS), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _sign(excess: jax.Array) -> jax.Array:
    """The signs of excesses ``[..., r]``; 0 for rounding errors and where not finite."""
    excess = jnp.where(jnp.isfinite(excess), excess, 0)
    size = jnp.abs(excess)
    noise = _ROUNDING * jnp.max(size, axis=-1, keepdims=True)
    return jnp.where(size > noise, jnp.sign(excess), 0)
