"""The learning-rate range test: a short run at rising learning rates, and what to read off it."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.schedules import range_run
from lowrank_optax.schedules.range_reading import (
    Mode,
    Suggestions,
    centred_mean,
    choose,
    read_curve,
)

STEPS = 100  # where neither `steps` nor `batches` say how many


class RangeTestResult(NamedTuple):
    """What `lr_range_test` found; its arrays are NumPy's, on the host.

    Attributes:
      learning_rates: Of each step, float32 ``[steps]``.
      losses: As the step returned them, float32 ``[steps]``; NaN past the stop.
      smoothed: Their exponential average, without bias, float32 ``[steps]``; NaN past the stop.
      stopped_at: Index of the step at which the loss blew up, or None.
      suggestions: Learning rates to choose among, each with its reason: see `Suggestions`.
      weight_decay: What the step was given, or None.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    stopped_at: int | None
    suggestions: Suggestions
    weight_decay: float | None = None


class RangeTestGrid(NamedTuple):
    """What `lr_range_test` found over several weight decays.

    Attributes:
      results: Of each weight decay.
      weight_decay: The one to take.
      reason: Why.
    """

    results: tuple[RangeTestResult, ...]
    weight_decay: float
    reason: str

    @property
    def lowest_losses(self) -> dict[float, float]:
        """The lowest loss of each weight decay, of the mean over a tenth of the steps."""
        return {float(x.weight_decay or 0): _lowest(x) for x in self.results}

    @property
    def best(self) -> RangeTestResult:
        """The result at ``weight_decay``."""
        return next(x for x in self.results if x.weight_decay == self.weight_decay)


def lr_range_test(
    step_fn: Callable[..., tuple[Any, Any]],
    state: Any,
    batches: Any,
    *,
    min_learning_rate: float = 1e-7,
    max_learning_rate: float = 10.0,
    steps: int | None = None,
    mode: Mode = "exponential",
    smoothing: float = 0.98,
    stop_factor: float = 4.0,
    warmup_steps: int = 0,
    weight_decay: Any = None,
    scan: bool | Literal["auto"] = "auto",
) -> Any:
    r"""Trains for a few steps at rising learning rates, and suggests a maximum; changes nothing.

    Step :math:`i` of :math:`N` takes the learning rate

    .. math::
      \eta_i = \eta_{\min} \left(\frac{\eta_{\max}}{\eta_{\min}}\right)^{i / (N - 1)}
      \quad \text{or} \quad
      \eta_i = \eta_{\min} + (\eta_{\max} - \eta_{\min}) \frac{i}{N - 1}

    (``"exponential"``, ``"linear"``), until the smoothed loss exceeds ``stop_factor`` times its
    lowest value so far, or a loss is not finite. The caller's ``state`` is never written to,
    moments and batch statistics in it included, also where ``step_fn`` donates it: go on from it as
    if there had been no test.

    Batches with a leading axis of steps are run through by one ``lax.scan``. Others are fed to one
    compiled step, whose learning rate is traced, and whose results are looked at every tenth step.

    Args:
      step_fn: ``step_fn(state, batch, learning_rate) -> (state, loss)``, with ``weight_decay`` as a
        fourth argument if that is given. It is traced; it may be jitted. The loss is a scalar float
        of any dtype: that of the training, or one of held-out data.
      state: Any tree of arrays: parameters, optimizer state, batch statistics, keys, ...
      batches: An array, tuple, dict, ... of arrays ``[steps, ...]``, the batches stacked; or a
        list, iterator or data loader that gives one after another; or None, if ``step_fn`` needs
        none.
      min_learning_rate: Of the first step.
      max_learning_rate: Of the last.
      steps: Number of steps :math:`N`. None for all batches of a stack or a list, otherwise 100.
      mode: How the learning rate rises.
      smoothing: Decay of the average of the losses.
      stop_factor: See above; ``inf`` stops at losses alone that are not finite.
      warmup_steps: Steps at ``min_learning_rate`` before the first one, which take a batch each and
        leave no record: for optimizers whose moments must settle.
      weight_decay: A number, handed on to ``step_fn``. Or several: each is tested, from the same
        state on the same batches, all in one program by ``vmap``.
      scan: Whether to use ``lax.scan``; True stacks batches that come one by one.

    Returns:
      A `RangeTestResult`; of several weight decays a `RangeTestGrid`.

    Raises:
      ValueError: If learning rates do not rise from above 0 (``"linear"``: from 0), there are fewer
        than 3 steps, or fewer batches than steps, or another option is out of range; or if no loss
        of a recorded step is finite.
      TypeError: If ``step_fn`` does not return the state's shapes and dtypes and a scalar loss.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> loss = lambda x: 0.5 * jnp.sum(jnp.array([1.0, 20.0]) * x**2)  # diverges above 2 / 20
      >>> def step_fn(x, batch, learning_rate):
      ...     value, gradient = jax.value_and_grad(loss)(x)
      ...     return x - learning_rate * gradient, value
      >>> result = lro.schedules.lr_range_test(step_fn, jnp.ones(2), None, min_learning_rate=1e-4)
      >>> for name, (rate, _) in result.suggestions._asdict().items():
      ...     print(f"{name} {rate:.4f}")
      minimum 0.0343
      steepest 0.0029
      valley 0.0105
      >>> print(result.suggestions.minimum.reason)
      a tenth of 0.34, where the loss was lowest (it fell from 10.4 to 0.00236)

    Reference:
      Smith, 2018, https://arxiv.org/abs/1803.09820, section 4.1; the exponential form, the
      smoothing and the stop are fastai's.
    """
    _check_rates(min_learning_rate, max_learning_rate, mode)
    _check_options(smoothing, stop_factor, warmup_steps, scan)
    number = _steps(batches, steps, warmup_steps)
    total = number + warmup_steps
    rates = _learning_rates(min_learning_rate, max_learning_rate, number, mode)
    decay = None if weight_decay is None else _weight_decay(weight_decay)

    test = range_run.RangeTest(step_fn, smoothing, stop_factor, decay)
    indices = np.arange(-warmup_steps, number, dtype=np.int32)
    all_rates = np.pad(rates, (warmup_steps, 0), mode="edge")
    if scan is True or (scan == "auto" and range_run.is_stacked(batches)):
        inputs = range_run.Inputs(range_run.stacked(batches, total), indices, all_rates)
        curve = range_run.scanned(test, state, inputs)
    else:
        each = range_run.one_by_one(batches, total)
        inputs = (range_run.Inputs(*x) for x in zip(each, indices, all_rates, strict=True))
        curve = range_run.looped(test, state, inputs)

    _check_finite(np.asarray(curve.losses), warmup_steps)
    curve = range_run.Curve(*(np.asarray(x)[..., warmup_steps:] for x in curve))
    if decay is None or decay.ndim == 0:
        return _result(rates, curve, mode, None if decay is None else float(weight_decay))
    each = (jax.tree.map(lambda x, i=i: x[i], curve) for i in range(len(decay)))
    pairs = zip(each, weight_decay, strict=True)
    return _grid(tuple(_result(rates, curve, mode, float(value)) for curve, value in pairs))


def _result(
    rates: np.ndarray, curve: range_run.Curve, mode: Mode, weight_decay: float | None
) -> RangeTestResult:
    """Curves as long as the learning rates, also where the loop ended early."""
    missing = (0, len(rates) - len(curve.losses))
    losses, smoothed = (
        np.pad(x, missing, constant_values=np.nan) for x in (curve.losses, curve.smoothed)
    )
    stopped_at = int(np.argmax(curve.stopped)) if curve.stopped.any() else None
    if stopped_at is not None:
        smoothed[stopped_at + 1 :] = np.nan
    suggestions = read_curve(rates, losses, mode)
    return RangeTestResult(rates, losses, smoothed, stopped_at, suggestions, weight_decay)


def _grid(results: tuple[RangeTestResult, ...]) -> RangeTestGrid:
    grid = RangeTestGrid(results, np.nan, "")
    falls = [np.ptp(centred_mean(x.losses)) for x in results if np.isfinite(_lowest(x))]
    decay, reason = choose(grid.lowest_losses, max(falls, default=0.0))
    return grid._replace(weight_decay=decay, reason=reason)


def _lowest(result: RangeTestResult) -> float:
    return float(np.min(centred_mean(result.losses), initial=np.inf))


def _learning_rates(low: float, high: float, number: int, mode: Mode) -> np.ndarray:
    space = np.geomspace if mode == "exponential" else np.linspace
    return space(low, high, number).astype(np.float32)


def _steps(batches: Any, steps: int | None, warmup_steps: int) -> int:
    there_are = range_run.count(batches)
    if steps is None:
        steps = STEPS if there_are is None else there_are - warmup_steps
    if steps < 3:
        raise ValueError(f"steps={steps} must be at least 3, after warmup_steps={warmup_steps}.")
    if there_are is not None and steps + warmup_steps > there_are:
        raise ValueError(
            f"steps={steps} and warmup_steps={warmup_steps} need {steps + warmup_steps} batches; "
            f"there are {there_are}. itertools.cycle(batches) repeats a list."
        )
    return steps


def _weight_decay(weight_decay: Any) -> Any:
    decay = jnp.asarray(weight_decay, jnp.float32)
    if decay.ndim > 1 or decay.size == 0:
        raise ValueError(
            f"weight_decay={weight_decay!r} must be None, a number, or a sequence of numbers."
        )
    return decay


def _check_finite(losses: np.ndarray, warmup_steps: int) -> None:
    """Raises ValueError if all losses ``[..., warmup_steps + steps]`` after the warm-up are not."""
    if np.isfinite(losses[..., warmup_steps:]).any():
        return
    first = losses.reshape(-1, losses.shape[-1])[0]
    step = int(np.argmax(~np.isfinite(first)))
    where = f"step {step} of the warm-up" if step < warmup_steps else "the first step"
    raise ValueError(
        f"step_fn returned the loss {first[step]} in {where}, so there is nothing to read: look "
        "for it in the state, the batch and the loss, or lower min_learning_rate."
    )


def _check_rates(low: float, high: float, mode: Mode) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} must be 'exponential' or 'linear'.")
    if not (0 <= low < high < np.inf) or (low == 0 and mode == "exponential"):
        zero = "0 <=" if mode == "linear" else "0 <"
        raise ValueError(
            f"min_learning_rate={low} and max_learning_rate={high} must be {zero} "
            f"min_learning_rate < max_learning_rate in mode {mode!r}."
        )


def _check_options(smoothing: float, stop_factor: float, warmup_steps: int, scan: Any) -> None:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing} must be 0 <= smoothing < 1.")
    if not stop_factor > 1:
        raise ValueError(f"stop_factor={stop_factor} must be above 1.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} must not be negative.")
    if scan not in (True, False, "auto"):
        raise ValueError(f"scan={scan!r} must be True, False or 'auto'.")
