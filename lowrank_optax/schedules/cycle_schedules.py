"""The curves of 1cycle: learning rate and momentum go through one cycle, then a last descent."""

from collections.abc import Sequence
import numbers
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

Shape = Literal["linear", "cosine"]


class OneCycleSchedules(NamedTuple):
    """The two schedules of a cycle, functions of the number of the step.

    Attributes:
      learning_rate: Up, down and further down.
      momentum: Down while the learning rate rises, up while it falls.
    """

    learning_rate: optax.Schedule
    momentum: optax.Schedule


def one_cycle_schedules(
    total_steps: int,
    max_learning_rate: float,
    *,
    low_div: float = 10.0,
    final_div: float = 1000.0,
    up: float = 0.45,
    down: float | None = 0.45,
    shape: Shape = "linear",
    max_momentum: float = 0.95,
    min_momentum: float = 0.85,
) -> OneCycleSchedules:
    r"""Learning rate and momentum of one cycle over steps 0 to ``total_steps - 1``.

    With :math:`S = T - 1` the last step, :math:`c_1 = \mathrm{up} \cdot S` and
    :math:`c_2 = (\mathrm{up} + \mathrm{down}) \cdot S`, they join straight lines, or half waves of
    a cosine, between

    .. math::
      \eta(0) = \tfrac{\eta_{\max}}{\mathrm{low\_div}}, \quad \eta(c_1) = \eta_{\max}, \quad
      \eta(c_2) = \eta(0), \quad \eta(S) = \tfrac{\eta_{\max}}{\mathrm{final\_div}}, \\
      m(0) = m_{\max}, \quad m(c_1) = m_{\min}, \quad m(c_2) = m(S) = m_{\max}.

    With ``down=None`` there are two phases: the rate falls from its maximum to its final value over
    all steps after :math:`c_1`, and momentum rises meanwhile. Ends of phases are no whole numbers
    in general, so they cannot fall together, however few the steps. Past the last step the final
    values are held.

    Args:
      total_steps: Number of steps :math:`T`, at least 3.
      max_learning_rate: The peak; see `lr_range_test` for how to find it.
      low_div: The peak over the learning rate at the start; the paper takes 3 to 20.
      final_div: The peak over the last learning rate.
      up: Share of the first phase.
      down: Share of the second, or None for two phases alone.
      shape: Of the way from one value to the next.
      max_momentum: At the start, and from the end of the second phase on.
      min_momentum: Where the learning rate is highest.

    Returns:
      Two functions of the step's number, a Python or traced integer or float or an array of them,
      to float32 of its shape.

    Raises:
      ValueError: If ``total_steps`` is below 3, a learning rate would not be positive, a share not
        between 0 and 1 or the shares leave no step to the last phase, ``shape`` is unknown, or
        momenta are not ``0 <= min_momentum <= max_momentum < 1``.

    Example:
      >>> import lowrank_optax as lro
      >>> cycle = lro.schedules.one_cycle_schedules(total_steps=101, max_learning_rate=1.0)
      >>> for step in (0, 45, 90, 100):
      ...     print(f"{cycle.learning_rate(step):.3f} {cycle.momentum(step):.3f}")
      0.100 0.950
      1.000 0.850
      0.100 0.950
      0.001 0.950

    Reference:
      Smith, A disciplined approach to neural network hyper-parameters: Part 1, 2018,
      https://arxiv.org/abs/1803.09820, section 4; its two phases with cosines are fastai's.
    """
    _check_cycle(total_steps, max_learning_rate, low_div, final_div)
    _check_phases(up, down, shape)
    if _known(max_momentum, min_momentum) and not 0 <= min_momentum <= max_momentum < 1:
        raise ValueError(
            f"min_momentum={min_momentum} and max_momentum={max_momentum} must be "
            "0 <= min_momentum <= max_momentum < 1."
        )
    last = total_steps - 1
    low, final = max_learning_rate / low_div, max_learning_rate / final_div
    if down is None:
        steps = (0.0, up * last, last)
        rates = (low, max_learning_rate, final)
        momenta = (max_momentum, min_momentum, max_momentum)
    else:
        steps = (0.0, up * last, (up + down) * last, last)
        rates = (low, max_learning_rate, low, final)
        momenta = (max_momentum, min_momentum, max_momentum, max_momentum)
    return OneCycleSchedules(_through(steps, rates, shape), _through(steps, momenta, shape))


def _through(steps: Sequence[Any], values: Sequence[Any], shape: Shape) -> optax.Schedule:
    """A function through `values` at `steps`, in float32, held past the last of them."""

    def schedule(count: Any) -> jax.Array:
        at, value = jnp.asarray(steps, jnp.float32), jnp.asarray(values, jnp.float32)
        step = jnp.clip(jnp.asarray(count, jnp.float32), at[0], at[-1])
        phase = jnp.searchsorted(at[1:-1], step, side="right")
        share = (step - at[phase]) / (at[phase + 1] - at[phase])
        # Both weights on their own: a final value far below the peak keeps its digits.
        weigh = (lambda x: x) if shape == "linear" else (lambda x: jnp.sin(jnp.pi / 2 * x) ** 2)
        return weigh(1 - share) * value[phase] + weigh(share) * value[phase + 1]

    return schedule


def _check_cycle(total_steps: Any, max_learning_rate: Any, low_div: Any, final_div: Any) -> None:
    if _known(total_steps) and total_steps < 3:
        raise ValueError(f"total_steps={total_steps} must be at least 3: up, down and the end.")
    divisors = {"low_div": low_div, "final_div": final_div}
    for name, value in {"max_learning_rate": max_learning_rate, **divisors}.items():
        if callable(value):
            raise ValueError(f"{name} must be a number, not a schedule: one_cycle is the schedule.")
        if _known(value) and not value > 0:
            raise ValueError(f"{name}={value} must be above 0.")


def _check_phases(up: Any, down: Any, shape: Shape) -> None:
    if shape not in get_args(Shape):
        raise ValueError(f"shape={shape!r} must be 'linear' or 'cosine'.")
    for name, value in {"up": up, "down": down}.items():
        if _known(value) and not 0 < value < 1:
            raise ValueError(f"{name}={value} must be between 0 and 1.")
    if _known(up, down) and up + down >= 1:
        raise ValueError(
            f"up={up} and down={down} must add up to less than 1, for a last phase; two phases "
            "alone are down=None."
        )


def _known(*values: Any) -> bool:
    """Whether all are plain numbers: traced ones are not looked at."""
    return all(isinstance(value, numbers.Real) for value in values)
