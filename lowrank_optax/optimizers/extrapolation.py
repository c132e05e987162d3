"""Extrapolation: gradients taken at a point ahead of the weights, for training with large batches.

The update is applied to the weights themselves. Whatever the optimizer, it gets these gradients in
the place of those of the loss at the weights.
"""

from collections.abc import Callable
from typing import Any, get_args

import jax
import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.optimizers.extrapolated import ExtrapolatedValueAndGrad, Variant
from lowrank_optax.optimizers.lookahead import (
    Direction,
    Distribution,
    Lookahead,
    Noise,
    check_inner_learning_rate,
)
from lowrank_optax.optimizers.workers import AxisName
from lowrank_optax.states.arguments import refuse_unused


def extrapolated_value_and_grad(
    loss_fn: Callable[..., Any],
    variant: Variant,
    inner_learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName | None = None,
    local_groups: int | None = None,
    has_aux: bool = False,
    direction: Direction = "gradient",
    max_norm: jax.typing.ArrayLike | None = None,
    noise: Distribution = "normal",
    filter_normalized: bool = False,
    weight_dimension_numbers: DimensionNumbersRule = None,
    seed: int = 0,
) -> ExtrapolatedValueAndGrad:
    r"""``jax.value_and_grad``, with the gradient taken at a point ahead of the parameters.

    With weights :math:`w`, worker :math:`k` of :math:`K` and its own batch,

    .. math::
      h_t^k = w_t - \hat\gamma_t \zeta_t^k, \qquad
      g_t^k = \nabla f(h_t^k; \mathrm{batch}_t^k), \qquad
      g_t = \tfrac{1}{K} \sum_k g_t^k,

    where :math:`\zeta_t^k` is

    - ``"past_local"``: :math:`g_{t-1}^k`, the worker's own last gradient. No further gradient is
      computed, and every worker looks at a point of its own, which smooths the loss;
    - ``"past_global"``: :math:`g_{t-1}`, their mean;
    - ``"same"``: :math:`\nabla f(w_t; \mathrm{batch}_t^k)`, on the same batch;
    - ``"fresh"``: :math:`\nabla f(w_t; \cdot)` on an independent batch: stochastic extragradient;
    - ``"noise"``: random numbers of mean 0 and variance 1;
    - ``"none"``: 0.

    Any optimizer takes :math:`g_t` as the gradient and applies its update to :math:`w_t`, which is
    what goes in and what stays with the caller: :math:`h` exists only inside. The first step of the
    past variants is plain, as if :math:`g_{-1}` were 0, and so is one after a gradient that was not
    finite. ``init`` again starts a new phase.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)``, which returns a scalar, or with ``has_aux`` a
        scalar and more: the mean over the worker's batch.
      variant: Where to look, as above.
      inner_learning_rate: :math:`\hat\gamma \ge 0`: a float, a traced scalar, or a schedule of the
        number of gradients so far; best a fixed share of the optimizer's rate. Where it is 0, the
        gradient is the plain one, and the first pass of ``"same"`` and ``"fresh"`` is skipped.
      axis_name: Under ``jax.shard_map`` (or ``jax.vmap``), the axis or axes of the data-parallel
        workers. Losses and gradients are averaged over it; parameters must be replicated over it.
        None elsewhere, also under ``jit`` with a batch that is sharded.
      local_groups: Number of workers here (on each device, with ``axis_name``), which run in turn,
        with the memory of one: the positional arguments then have a first axis of this size, and
        micro-batches are workers. (An optimizer in ``optax.MultiSteps`` would instead look ahead
        along the gradient of another part of the same batch.)
      has_aux: Whether the loss returns more: of the pass at :math:`h` alone, so that running
        statistics are updated once. It is the worker's own; stacked if there are ``local_groups``.
      direction: What is made of a gradient before it is :math:`\zeta`: ``"gradient"``, itself;
        ``"normalized"``, that of each weight divided by the root of its mean square, so that
        :math:`\hat\gamma` has the scale of Adam's learning rates; or a function of the tree of
        gradients (in float32), such as Adam's preconditioner.
      max_norm: Largest norm of :math:`\zeta`, over all leaves; None for no bound.
      noise: Distribution of ``"noise"``.
      filter_normalized: Whether noise is multiplied by the norm of its weight's column; then
        :math:`\hat\gamma \sqrt{d}` is the size of a perturbation of a column of :math:`d` weights
        relative to it.
      weight_dimension_numbers: Which leaves are matrices, and how: see `scale_by_projection`.
        ``"normalized"`` takes layers that are stacked in a leaf one by one; ``filter_normalized``
        takes columns, which of other leaves the last axis counts.
      seed: Of the noise; the step and the number of the worker are folded in.

    Returns:
      ``f`` with ``state = f.init(params)`` and ``value, gradients, state = f(params, state,
      *args)``: see `ExtrapolatedValueAndGrad`. For ``"fresh"``, ``independent=(batch, ...)`` are
      the arguments of the first pass.

    Raises:
      ValueError: If an argument is out of range, or has no effect on this variant.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> loss = lambda params, x: 0.5 * jnp.sum((params["w"] - x) ** 2)
      >>> tx = optax.adam(0.1)
      >>> value_and_grad = lro.extrapolated_value_and_grad(loss, "past_local", 0.1)
      >>> params = {"w": jnp.zeros(2)}
      >>> opt_state, state = tx.init(params), value_and_grad.init(params)
      >>> for x in (jnp.ones(2), jnp.ones(2)):
      ...     value, gradients, state = value_and_grad(params, state, x)
      ...     updates, opt_state = tx.update(gradients, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(gradients["w"].round(3))  # of the second step, at 0.1 + 0.1
      [-0.8 -0.8]

    Reference:
      Lin et al., Extrapolation for Large-batch Training in Deep Learning, 2020,
      https://arxiv.org/abs/2006.05720: the framework, and EXTRAP-SGD, which is ``"past_local"``.
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant={variant!r} must be one of {', '.join(get_args(Variant))}.")
    if local_groups is not None and local_groups < 1:
        raise ValueError(f"local_groups={local_groups} must be at least 1, or None.")
    check_inner_learning_rate(inner_learning_rate)
    unused: dict[str, Any] = {}
    if variant != "noise":
        unused |= {"noise": noise, "filter_normalized": filter_normalized}
    if variant in ("noise", "none"):
        unused |= {"direction": direction, "max_norm": max_norm}
    if not (filter_normalized if variant == "noise" else direction == "normalized"):
        unused["weight_dimension_numbers"] = weight_dimension_numbers
    refuse_unused(extrapolated_value_and_grad, f"variant={variant!r}", **unused)
    return ExtrapolatedValueAndGrad(
        loss_fn,
        variant,
        inner_learning_rate,
        axis_name,
        local_groups,
        has_aux,
        Lookahead.checked(direction, max_norm, weight_dimension_numbers),
        Noise.checked(noise, filter_normalized, weight_dimension_numbers),
        seed,
    )
