"""Powerpropagation in the optimizer: the parameters are the weights themselves."""

from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.layers.powerpropagation.reparameterisation import (
    Alpha,
    Where,
    check_alpha,
    map_selected,
    power,
    refuse_zeros,
    root,
    slope,
)
from lowrank_optax.states.arguments import transformation
from lowrank_optax.states.moment_names import moment_kinds
from lowrank_optax.states.precision import in_float32, keep_dtypes

Mode: TypeAlias = Literal["plain", "weight_space"]


def powerprop_updates(
    inner: optax.GradientTransformation,
    alpha: Alpha,
    mode: Mode | None = None,
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Train :math:`\theta` by ``inner`` while the parameters are the weights :math:`w`.

    Each step computes :math:`\theta = \mathrm{sign}(w) |w|^{1/\alpha}` from the weights, moves it,
    and returns the difference that this makes to the weights:

    .. math::
      \text{plain:} \quad u &= \mathrm{inner}(\alpha |\theta|^{\alpha-1} \, \partial L/\partial w,
      \; \theta), \\
      \text{weight\_space:} \quad u &= \alpha |\theta|^{\alpha-1} \,
      \mathrm{inner}(\partial L/\partial w, \; w), \\
      \Delta w &= f(\theta + u) - f(\theta), \qquad f(\theta) = \theta |\theta|^{\alpha - 1}.

    ``"plain"`` makes the steps of ``inner`` on the parameters of `powerprop`: a small step of
    gradient descent changes a weight by
    :math:`-\eta \alpha^2 |w|^{2 - 2/\alpha} \, \partial L/\partial w`. An optimizer that normalises
    gradients, such as Adam, cancels one of the two factors; ``"weight_space"`` restores it:
    :math:`-\eta \alpha^2 |w|^{2 - 2/\alpha}` times Adam's direction.

    Nothing has to be exported, and ``alpha`` may change at any step. The state is that of
    ``inner``. Gradients leave a weight of zero at zero; momentum may move it in mode ``"plain"``:
    use `mask_updates` for pruned ones.

    Weight decay in ``inner`` acts on :math:`\theta` in mode ``"plain"``: decoupled decay by a
    factor :math:`1 - \eta \lambda` multiplies ``w`` by :math:`(1 - \eta\lambda)^\alpha`. In mode
    ``"weight_space"`` it is part of the direction, so small weights hardly decay. Decay that is
    chained after this transformation acts on ``w``.

    Args:
      inner: Any optax transformation with its learning rate, such as ``optax.sgd(0.1)``.
      alpha: Exponent, at least 1. The Python number 1 returns ``inner``.
      mode: Space in which ``inner`` works; None for ``"weight_space"`` if its state has averages of
        squared gradients (Adam, RMSprop, Adafactor, ...) and ``"plain"`` otherwise. Give
        ``"weight_space"`` for optimizers that normalise without them (Lion, Muon, sign descent).
      where: Leaves, as for `powerprop`; ``inner`` trains the other leaves as usual.

    Returns:
      A transformation that needs ``params``. It computes in float32 for narrower dtypes; updates
      have the dtypes of the gradients.

    Raises:
      ValueError: If ``alpha`` is below 1 (unless traced) or ``mode`` unknown; in ``init``, if a
        selected leaf is all zero; in ``update``, without ``params``.
      TypeError: If ``alpha`` is not a scalar, or ``where`` has another type.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.layers.powerprop_updates(optax.sgd(0.01), 2.0)
      >>> params = {"kernel": jnp.array([[1.0, 0.01]])}
      >>> updates, _ = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
      >>> print([f"{x:.4f}" for x in updates["kernel"].ravel()])  # (1 - 0.02)² - 1, ...
      ['-0.0396', '-0.0004']

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296, and its correction for adaptive
      optimizers.
    """
    check_alpha(alpha)
    if mode is not None and mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} must be 'plain', 'weight_space' or None.")
    inner = transformation("inner", inner)
    if isinstance(alpha, int | float) and alpha == 1:
        return inner

    in_weight_space = lambda state: (
        mode == "weight_space" if mode else "unsigned" in moment_kinds(state)
    )
    to_theta = lambda weights: map_selected(lambda w: root(w, alpha), where, weights)

    def init_fn(params: optax.Params) -> optax.OptState:
        refuse_zeros(params, alpha, where)
        state = jax.eval_shape(inner.init, params)
        return inner.init(params if in_weight_space(state) else to_theta(params))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError(
                "powerprop_updates needs params: call tx.update(grads, state, params)."
            )
        theta = to_theta(params)
        times_slope = lambda x, t: (slope(t, alpha) * x).astype(x.dtype)
        if in_weight_space(state):
            updates, state = inner.update(updates, state, params, **extra_args)
            updates = map_selected(times_slope, where, updates, theta)
        else:
            updates = map_selected(times_slope, where, updates, theta)
            updates, state = inner.update(updates, state, theta, **extra_args)
        # Compiled, the two powers may round differently; a step of zero is still no update.
        difference = lambda u, t: power(t + u, alpha) - power(t, alpha)
        step = lambda u, t: jnp.where(u == 0, 0, difference(u, t))
        return map_selected(step, where, updates, theta), state

    return keep_dtypes(in_float32(optax.GradientTransformationExtraArgs(init_fn, update_fn)))
