"""1cycle: learning rate and momentum go through one cycle, as schedules and as an optimizer."""

from collections.abc import Callable
import functools
import inspect
import numbers
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.states.arguments import refuse_unused
from lowrank_optax.states.precision import in_float32, keep_dtypes

Shape = Literal["linear", "cosine"]


class OneCycleSchedules(NamedTuple):
    """The two schedules of a cycle, functions of the step count.

    Attributes:
      learning_rate: Rises to the peak, falls back to the first value, then falls further.
      momentum: Falls while the learning rate rises and rises while it falls.
    """

    learning_rate: optax.Schedule
    momentum: optax.Schedule


def one_cycle_schedules(
    total_steps: int,
    peak_value: float,
    *,
    div_factor: float = 10.0,
    final_div_factor: float = 100.0,
    pct_start: float = 0.45,
    pct_final: float | None = 0.9,
    shape: Shape = "linear",
    max_momentum: float = 0.95,
    min_momentum: float = 0.85,
) -> OneCycleSchedules:
    r"""Learning rate and momentum of one cycle over steps 0 to ``total_steps - 1``.

    The arguments are named as in ``optax.linear_onecycle_schedule``. With :math:`S = T - 1` the
    last step, :math:`c_1 = \mathrm{pct\_start} \cdot S` and
    :math:`c_2 = \mathrm{pct\_final} \cdot S`, straight lines or half cosine waves join the values

    .. math::
      \eta(0) = \tfrac{\eta_{\max}}{\mathrm{div\_factor}}, \quad \eta(c_1) = \eta_{\max}, \quad
      \eta(c_2) = \eta(0), \quad \eta(S) = \tfrac{\eta(0)}{\mathrm{final\_div\_factor}}, \\
      m(0) = m_{\max}, \quad m(c_1) = m_{\min}, \quad m(c_2) = m(S) = m_{\max}.

    With ``pct_final=None`` there are two phases: after :math:`c_1` the rate falls to its final
    value and momentum rises. The ends of the phases are not rounded to steps. After the last step
    the final values are held.

    Args:
      total_steps: Number of steps :math:`T`, at least 3.
      peak_value: Largest learning rate; `lr_range_test` helps to find it.
      div_factor: Peak over the first learning rate; the paper uses 3 to 20.
      final_div_factor: First over the last learning rate.
      pct_start: Fraction of the steps in the first phase.
      pct_final: Fraction of the steps in the first two phases, or None for two phases only.
      shape: ``"linear"`` or ``"cosine"``.
      max_momentum: Momentum at the start, and from the end of the second phase.
      min_momentum: Momentum at the peak of the learning rate.

    Returns:
      Two functions of the step count (a Python or traced number, or an array) to float32 of its
      shape.

    Raises:
      ValueError: If ``total_steps`` is below 3, ``peak_value`` or a factor is not positive,
        ``shape`` is unknown, or not ``0 < pct_start < pct_final < 1`` and
        ``0 <= min_momentum <= max_momentum < 1``.

    Example:
      >>> import lowrank_optax as lro
      >>> cycle = lro.schedules.one_cycle_schedules(total_steps=101, peak_value=1.0)
      >>> for step in (0, 45, 90, 100):
      ...     print(f"{cycle.learning_rate(step):.3f} {cycle.momentum(step):.3f}")
      0.100 0.950
      1.000 0.850
      0.100 0.950
      0.001 0.950

    Reference:
      Smith, A disciplined approach to neural network hyper-parameters: Part 1, 2018,
      https://arxiv.org/abs/1803.09820, section 4; the form with two cosine phases is fastai's.
    """
    if _known(total_steps) and total_steps < 3:
        raise ValueError(f"total_steps={total_steps} must be at least 3: up, down and the end.")
    factors = {"div_factor": div_factor, "final_div_factor": final_div_factor}
    for name, value in {"peak_value": peak_value, **factors}.items():
        if callable(value):
            raise ValueError(f"{name} must be a number, not a schedule: one_cycle is the schedule.")
        if _known(value) and not value > 0:
            raise ValueError(f"{name}={value} must be above 0.")
    if shape not in get_args(Shape):
        raise ValueError(f"shape={shape!r} must be 'linear' or 'cosine'.")
    if _known(pct_start) and not 0 < pct_start < 1:
        raise ValueError(f"pct_start={pct_start} must be between 0 and 1.")
    if pct_final is not None and _known(pct_final):
        start, low = (pct_start, f"{pct_start=}") if _known(pct_start) else (0, "0")
        if not start < pct_final < 1:
            raise ValueError(
                f"pct_final={pct_final} must be between {low} and 1, or None for two phases."
            )
    if _known(max_momentum, min_momentum) and not 0 <= min_momentum <= max_momentum < 1:
        raise ValueError(
            f"min_momentum={min_momentum} and max_momentum={max_momentum} must be "
            "0 <= min_momentum <= max_momentum < 1."
        )
    first = peak_value / div_factor
    starts, rates = [0.0, pct_start], [first, peak_value]
    momenta = [max_momentum, min_momentum, max_momentum]
    if pct_final is not None:
        starts, rates, momenta = [*starts, pct_final], [*rates, first], [*momenta, max_momentum]
    rates.append(first / final_div_factor)
    last = total_steps - 1
    steps = [*(start * last for start in starts), last]

    def through(values: list[Any]) -> optax.Schedule:
        def schedule(count: Any) -> jax.Array:
            at, value = jnp.asarray(steps, jnp.float32), jnp.asarray(values, jnp.float32)
            step = jnp.clip(jnp.asarray(count, jnp.float32), at[0], at[-1])
            phase = jnp.searchsorted(at[1:-1], step, side="right")
            share = (step - at[phase]) / (at[phase + 1] - at[phase])
            # Two separate weights: a final value far below the peak keeps its digits.
            weigh = (lambda x: x) if shape == "linear" else (lambda x: jnp.sin(jnp.pi / 2 * x) ** 2)
            return weigh(1 - share) * value[phase] + weigh(share) * value[phase + 1]

        return schedule

    return OneCycleSchedules(through(rates), through(momenta))


def _known(*values: Any) -> bool:
    """Whether all values are Python numbers: traced ones are not checked."""
    return all(isinstance(value, numbers.Real) for value in values)


def one_cycle(
    optimizer_factory: Callable[..., optax.GradientTransformation],
    total_steps: int,
    peak_value: float,
    *,
    div_factor: float = 10.0,
    final_div_factor: float = 100.0,
    pct_start: float = 0.45,
    pct_final: float | None = 0.9,
    shape: Shape = "linear",
    max_momentum: float = 0.95,
    min_momentum: float = 0.85,
    momentum_name: str | None = "auto",
    dampen: bool = False,
    **hyperparams: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer whose learning rate and momentum follow `one_cycle_schedules`.

    It is ``optax.inject_hyperparams(optimizer_factory)`` with float32 schedules and arithmetic,
    whatever the dtype of the parameters. ``optax.tree.get(state, "hyperparams")`` is a dict of the
    values at the last step, ``"learning_rate"`` and ``"momentum"`` or ``"b1"``. All other arguments
    of the factory are constants of the program, so ranks and other integers need no
    ``static_args``.

    Args:
      optimizer_factory: Function that makes an optimizer from ``learning_rate``, and ``momentum``
        or ``b1`` if it has one: ``optax.sgd``, ``optax.adamw``, ``lowrank_optax.galore``, ...
      total_steps: Number of optimizer steps, at least 3 (micro-batches do not count).
      peak_value: Largest learning rate.
      div_factor, final_div_factor, pct_start, pct_final, shape, max_momentum, min_momentum: As in
        `one_cycle_schedules`.
      momentum_name: Argument of the factory that follows the momentum. ``"auto"``: ``momentum`` or
        ``b1``, whichever the factory has; without either, only the learning rate cycles. None:
        only the learning rate cycles.
      dampen: Whether to multiply gradients by one minus the momentum :math:`m`, for optimizers that
        are linear in the gradients, such as ``optax.sgd``: steps of length :math:`\eta` instead of
        :math:`\eta / (1 - m)`.
      **hyperparams: Other arguments of the factory.

    Returns:
      The optimizer, with the state of ``optax.inject_hyperparams``. Its moments are float32 for
      parameters in half precision.

    Raises:
      ValueError: If the factory has no argument ``learning_rate`` or ``momentum_name``, if one that
        cycles is among ``hyperparams``, if ``dampen`` is set for ``b1`` or without a momentum, and
        as in `one_cycle_schedules`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.training.one_cycle(optax.adamw, 100, 0.3, weight_decay=1e-4)
      >>> loss = lambda params: jnp.sum((params["bias"] - 2.0) ** 2)
      >>> def step(carry, _):
      ...     params, state = carry
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return (optax.apply_updates(params, updates), state), state.hyperparams
      >>> params = {"bias": jnp.zeros(3)}
      >>> (params, _), log = jax.lax.scan(step, (params, tx.init(params)), length=100)
      >>> print(f"{loss(params):.3f}", *(f"{name} {log[name][44]:.2f}" for name in sorted(log)))
      0.000 b1 0.85 learning_rate 0.30

    Reference:
      Smith, 2018, https://arxiv.org/abs/1803.09820, sections 4.1 to 4.3.
    """
    arguments = inspect.signature(optimizer_factory).parameters
    factory_name = getattr(optimizer_factory, "__name__", repr(optimizer_factory))
    momentum = momentum_name
    if momentum_name == "auto":
        momentum = next((name for name in ("momentum", "b1") if name in arguments), None)
    schedules = one_cycle_schedules(
        total_steps,
        peak_value,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
        pct_start=pct_start,
        pct_final=pct_final,
        shape=shape,
        max_momentum=max_momentum,
        min_momentum=min_momentum,
    )
    cycled = {"learning_rate": schedules.learning_rate}
    if momentum is None:
        because = "momentum_name=None or an optimizer_factory without momentum and b1"
        refuse_unused(one_cycle, because, max_momentum=max_momentum, min_momentum=min_momentum)
    else:
        cycled[momentum] = schedules.momentum
    for name in cycled:
        if name not in arguments:
            raise ValueError(
                f"{factory_name} has no argument {name!r} that could cycle; it has "
                f"{', '.join(arguments)}."
            )
        if name in hyperparams:
            raise ValueError(
                f"{name}={hyperparams[name]!r} was given, but {name} cycles."
                + ("" if name == "learning_rate" else " To hold it, pass momentum_name=None.")
            )
    if dampen and momentum in (None, "b1"):
        fault = "weighs gradients by 1 - b1 itself" if momentum else "has no momentum that cycles"
        raise ValueError(
            f"dampen=True needs an optimizer with undamped momentum; {factory_name} {fault}."
        )

    @functools.wraps(optimizer_factory)
    def damped(**values: Any) -> optax.GradientTransformationExtraArgs:
        tx = optax.with_extra_args_support(optimizer_factory(**values))
        scale = 1 - values[str(momentum)]

        def update_fn(updates: optax.Updates, *args: Any, **extra_args: Any) -> Any:
            return tx.update(optax.tree.scale(scale, updates), *args, **extra_args)

        return optax.GradientTransformationExtraArgs(tx.init, update_fn)

    factory = damped if dampen else optimizer_factory
    inject = optax.inject_hyperparams(factory, set(arguments) - set(cycled), jnp.float32)
    return keep_dtypes(in_float32(inject(**cycled, **hyperparams)))
