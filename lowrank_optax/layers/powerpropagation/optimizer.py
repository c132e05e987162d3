"""Powerpropagation as a part of the optimizer: the parameters are the weights themselves."""

from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.layers.powerpropagation.power import Alpha, power, root, slope
from lowrank_optax.layers.powerpropagation.reparameterisation import check_alpha, refuse_zeros
from lowrank_optax.layers.powerpropagation.where import Where, map_selected
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
    r"""An optimizer that trains :math:`\theta` while the parameters are the weights :math:`w`.

    At each step :math:`\theta = \mathrm{sign}(w) |w|^{1/\alpha}` is found from the weights, moved,
    and the update is the difference it makes to them:

    .. math::
      \text{plain:} \quad u &= \mathrm{inner}(\alpha |\theta|^{\alpha-1} \, \partial L/\partial w,
      \; \theta), \\
      \text{weight\_space:} \quad u &= \alpha |\theta|^{\alpha-1} \,
      \mathrm{inner}(\partial L/\partial w, \; w), \\
      \Delta w &= f(\theta + u) - f(\theta), \qquad f(\theta) = \theta |\theta|^{\alpha - 1}.

    ``"plain"`` is ``inner`` on what `powerprop` reparameterises: of gradient descent, a small step
    changes a weight by :math:`-\eta \alpha^2 |w|^{2 - 2/\alpha} \, \partial L/\partial w`. An
    optimizer that normalises gradients, as Adam does, cancels one of the two factors;
    ``"weight_space"`` gives it back: :math:`-\eta \alpha^2 |w|^{2 - 2/\alpha}` times its direction.

    There is nothing to export, evaluation and pruning see the weights, the loss is not touched, and
    ``alpha`` may change at any step. The state is ``inner``'s. A weight of zero stays zero by
    gradients alone; momentum may move it in mode ``"plain"``: see `mask_updates` for pruned ones.

    Weight decay in ``inner``: in mode ``"plain"`` it acts on :math:`\theta`, so that decoupled
    decay by a factor :math:`1 - \eta \lambda` takes :math:`(1 - \eta\lambda)^\alpha` to ``w``. In
    mode ``"weight_space"`` it is part of the direction, so small weights hardly decay. Decay that
    is chained behind acts on ``w`` as ever.

    Args:
      inner: Any optax transformation with its learning rate, such as ``optax.sgd(0.1)``.
      alpha: The exponent, at least 1. At the Python number 1 the result is ``inner``.
      mode: In which space ``inner`` works; None for ``"weight_space"`` if its state has averages of
        squared gradients (Adam, RMSprop, Adafactor, ...) and ``"plain"`` otherwise. Optimizers that
        normalise without them (Lion, Muon, sign descent) are to be given ``"weight_space"``.
      where: Which leaves, as for `powerprop`; ``inner`` treats the others as ever.

    Returns:
      A transformation that needs ``params``. It computes in float32 for narrower dtypes; updates
      have the gradients' dtypes.

    Raises:
      ValueError: If ``alpha`` is below 1 (unless traced) or ``mode`` unknown; in ``init``, if a
        selected leaf is all zero; in ``update``, without ``params``.
      TypeError: If ``alpha`` is no scalar, or ``where`` none of its kinds.

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

    def in_weight_space(state: optax.OptState) -> bool:
        return mode == "weight_space" if mode else "unsigned" in moment_kinds(state)

    to_theta = lambda weights: map_selected(lambda w: root(w, alpha), where, weights)

    def init_fn(params: optax.Params) -> optax.OptState:
        refuse_zeros(params, alpha, where)
        weight_space = in_weight_space(jax.eval_shape(inner.init, params))
        return inner.init(params if weight_space else to_theta(params))

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
        # Compiled, the two powers may round differently; no step is no update all the same.
        difference = lambda u, t: power(t + u, alpha) - power(t, alpha)
        step = lambda u, t: jnp.where(u == 0, 0, difference(u, t))
        return map_selected(step, where, updates, theta), state

    return keep_dtypes(in_float32(optax.GradientTransformationExtraArgs(init_fn, update_fn)))
