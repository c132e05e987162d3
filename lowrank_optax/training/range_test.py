"""The learning-rate range test: a short run at rising learning rates, and what to read off it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import itertools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

Mode = Literal["exponential", "linear"]


class Suggestion(NamedTuple):
    """A maximal learning rate and the reason for it.

    Attributes:
      learning_rate: NaN if the loss never fell or was not finite.
      reason: A sentence.
    """

    learning_rate: float
    reason: str


class Suggestions(NamedTuple):
    """Three readings of one curve, smoothed by a centred mean, which does not lag.

    Attributes:
      minimum: A tenth of the rate with the lowest loss: cautious, also good for a constant rate.
      steepest: The rate at which the loss fell fastest, on the axis of the learning rates.
      valley: The middle of the fall, on that axis.
    """

    minimum: Suggestion
    steepest: Suggestion
    valley: Suggestion


class RangeTestResult(NamedTuple):
    """Result of `lr_range_test`; its arrays are NumPy arrays on the host.

    Attributes:
      learning_rates: Learning rate of each step, float32 ``[steps]``.
      losses: Losses that the step returned, float32 ``[steps]``; NaN after the stop.
      smoothed: Bias-corrected exponential average of the losses, likewise.
      stopped_at: Index of the step at which the loss blew up, or None.
      suggestions: Learning rates to choose from, see `Suggestions`.
      weight_decay: Weight decay that the step was given, or None.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    stopped_at: int | None
    suggestions: Suggestions
    weight_decay: float | None = None


class RangeTestGrid(NamedTuple):
    """Results of `lr_range_test` for several weight decays.

    Attributes:
      results: One result per weight decay.
      weight_decay: The suggested one: the largest whose lowest loss equals the best one, within a
        hundredth of the fall.
      reason: A sentence.
    """

    results: tuple[RangeTestResult, ...]
    weight_decay: float
    reason: str

    @property
    def lowest_losses(self) -> dict[float, float]:
        """The lowest loss of each weight decay, smoothed by a mean over a tenth of the steps."""
        lowest = lambda x: float(np.min(centred_mean(x.losses), initial=np.inf))
        return {float(x.weight_decay or 0): lowest(x) for x in self.results}

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
    """Trains for a few steps at rising learning rates and suggests a maximum.

    The learning rates rise by a constant factor or difference until the smoothed loss exceeds
    ``stop_factor`` times its lowest value or a loss is not finite. The test never writes to
    ``state``, even if ``step_fn`` donates it: continue from it as if there had been no test.

    Batches with a leading axis of steps run in one ``lax.scan``. Other batches go to one compiled
    step, one by one; every tenth step the test waits for the results and may stop.

    Args:
      step_fn: ``step_fn(state, batch, learning_rate) -> (state, loss)``, with ``weight_decay`` as a
        fourth argument if that is given. It is traced; it may be jitted. The loss is a scalar float
        of any dtype, from the training or from held-out data.
      state: Any tree of arrays: parameters, optimizer state, batch statistics, keys, ...
      batches: Any tree of arrays ``[steps, ...]``, the stacked batches; or a list, iterator or data
        loader of batches; or None if ``step_fn`` needs none.
      min_learning_rate: Learning rate of the first step.
      max_learning_rate: Learning rate of the last step.
      steps: Number of steps. None for all batches of a stack or a list, otherwise 100.
      mode: ``"exponential"`` or ``"linear"`` growth.
      smoothing: Decay of the average of the losses.
      stop_factor: Multiple of the lowest smoothed loss that stops the test; ``inf`` to stop only at
        losses that are not finite.
      warmup_steps: Number of unrecorded steps at ``min_learning_rate`` before the first one, for
        optimizers whose moments must settle. They use up a batch each.
      weight_decay: A number passed to ``step_fn``, or a sequence of them: then each is tested from
        the same state on the same batches, in one program by ``vmap``.
      scan: Whether to use ``lax.scan``; True stacks batches that come one by one.

    Returns:
      A `RangeTestResult`, or a `RangeTestGrid` for several weight decays.

    Raises:
      ValueError: If learning rates do not rise from above 0 (``"linear"``: from 0), there are fewer
        than 3 steps, or fewer batches than steps, another option is out of range, or no loss of a
        recorded step is finite.
      TypeError: If ``step_fn`` does not return the state's shapes and dtypes and a scalar loss.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> loss = lambda x: 0.5 * jnp.sum(jnp.array([1.0, 20.0]) * x**2)  # diverges above 2 / 20
      >>> def step_fn(x, batch, learning_rate):
      ...     value, gradient = jax.value_and_grad(loss)(x)
      ...     return x - learning_rate * gradient, value
      >>> result = lro.training.lr_range_test(step_fn, jnp.ones(2), None, min_learning_rate=1e-4)
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
    low, high = min_learning_rate, max_learning_rate
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} must be 'exponential' or 'linear'.")
    if not (0 <= low < high < np.inf) or (low == 0 and mode == "exponential"):
        raise ValueError(
            f"min_learning_rate={low} and max_learning_rate={high} must be "
            f"{'0 <=' if mode == 'linear' else '0 <'} min_learning_rate < max_learning_rate in "
            f"mode {mode!r}."
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing} must be 0 <= smoothing < 1.")
    if not stop_factor > 1:
        raise ValueError(f"stop_factor={stop_factor} must be above 1.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} must not be negative.")
    if scan not in (True, False, "auto"):
        raise ValueError(f"scan={scan!r} must be True, False or 'auto'.")
    decay = None if weight_decay is None else jnp.asarray(weight_decay, jnp.float32)
    if decay is not None and (decay.ndim > 1 or decay.size == 0):
        raise ValueError(
            f"weight_decay={weight_decay!r} must be None, a number, or a sequence of numbers."
        )
    is_stacked, available = _layout(batches)
    if steps is None:
        steps = 100 if available is None else available - warmup_steps
    total = steps + warmup_steps
    if steps < 3:
        raise ValueError(f"steps={steps} must be at least 3, after warmup_steps={warmup_steps}.")
    if available is not None and total > available:
        raise ValueError(
            f"steps={steps} and warmup_steps={warmup_steps} need {total} batches; there are "
            f"{available}. itertools.cycle(batches) repeats a list."
        )
    rates = (np.geomspace if mode == "exponential" else np.linspace)(low, high, steps)
    rates = rates.astype(np.float32)

    def advance(carry: Any, inputs: Any, decay: Any) -> tuple[Any, Any]:
        """One step; the carry is the state, the average and lowest loss, and whether it stopped."""
        state, average, best, stopped = carry
        batch, index, rate = inputs  # the index is negative in the warm-up
        extra = () if decay is None else (decay,)
        step = lambda: _checked(step_fn(state, batch, rate, *extra), state)
        state, loss = jax.lax.cond(stopped, lambda: (state, jnp.float32(jnp.nan)), step)
        recorded = index >= 0
        average = jnp.where(recorded, smoothing * average + (1 - smoothing) * loss, average)
        smoothed = average / (1 - jnp.float32(smoothing) ** (jnp.maximum(index, 0) + 1))
        # Also for losses below zero: as far above the lowest as stop_factor times it would be.
        limit = best + (stop_factor - 1) * jnp.abs(best)
        stopped = stopped | ~jnp.isfinite(loss) | (recorded & (smoothed > limit))
        best = jnp.where(recorded, jnp.fmin(best, smoothed), best)
        return (state, average, best, stopped), (loss, smoothed, stopped)

    several = decay is not None and decay.ndim == 1
    step = jax.vmap(advance, (0, None, 0)) if several else advance

    def start(state: Any) -> Any:
        carry = (state, jnp.zeros([]), jnp.full([], jnp.inf), jnp.zeros([], bool))
        return jax.vmap(lambda _: carry)(decay) if several else carry

    indices = np.arange(-warmup_steps, steps, dtype=np.int32)
    all_rates = np.pad(rates, (warmup_steps, 0), mode="edge")
    if is_stacked:
        one_by_one = (jax.tree.map(lambda x, i=i: x[i], batches) for i in range(total))
        stacked = lambda: jax.tree.map(lambda x: x[:total], batches)
    else:
        one_by_one = _first(batches, total)
        stacked = lambda: jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    if scan is True or (scan == "auto" and is_stacked):

        def run(state: Any, inputs: Any) -> Any:
            first = start(jax.tree.map(jnp.asarray, state))
            return jax.lax.scan(lambda carry, x: step(carry, x, decay), first, inputs)[1]

        points = jax.jit(run)(state, (stacked(), indices, all_rates))
    else:
        # Copies, because the step donates them.
        copy = lambda x: x.copy() if isinstance(x, jax.Array) else jnp.array(x)
        carry, points = start(jax.tree.map(copy, state)), []
        step = jax.jit(step, donate_argnums=0)
        for inputs in zip(one_by_one, indices, all_rates, strict=True):
            carry, point = step(carry, inputs, decay)
            points.append(point)
            # A step after the stop does nothing, so waiting only now and then changes nothing.
            if len(points) % 10 == 0 and bool(point[2].all()):
                break
        points = jax.tree.map(lambda *x: jnp.stack(x), *points)

    losses, smoothed, stopped = (np.asarray(x).reshape(len(x), -1) for x in points)
    if not np.isfinite(losses[warmup_steps:]).any():
        first = int(np.argmax(~np.isfinite(losses[:, 0])))
        where = f"step {first} of the warm-up" if first < warmup_steps else "the first step"
        raise ValueError(
            f"step_fn returned the loss {losses[first, 0]} in {where}, so there is nothing to "
            "read: look for it in the state, the batch and the loss, or lower min_learning_rate."
        )
    results = []
    for run, value in enumerate(weight_decay if several else [weight_decay]):
        pad = lambda x: np.pad(x, (0, total - len(x)), constant_values=np.nan)[warmup_steps:]
        loss, average = pad(losses[:, run]), pad(smoothed[:, run])
        blown_up = np.flatnonzero(stopped[warmup_steps:, run])
        stopped_at = int(blown_up[0]) if blown_up.size else None
        if stopped_at is not None:
            average[stopped_at + 1 :] = np.nan
        value = None if value is None else float(value)
        suggestions = read_curve(rates, loss, mode)
        results.append(RangeTestResult(rates, loss, average, stopped_at, suggestions, value))
    return _grid(tuple(results)) if several else results[0]


def _checked(returned: Any, state: Any) -> tuple[Any, jax.Array]:
    """What ``step_fn`` returned, if it is a state like the one it was given and a scalar loss."""
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(f"step_fn must return (state, loss), not {_shapes(returned)}.")
    new, loss = jax.tree.map(jnp.asarray, returned[0]), returned[1]
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"step_fn must return (state, loss) with a scalar loss, not {_shapes(loss)}."
        )
    structures = jax.tree.structure(state), jax.tree.structure(new)
    must = "step_fn must return a state like the one it takes"
    if structures[0] != structures[1]:
        raise TypeError(f"{must}, {structures[0]}, not {structures[1]}.")
    for (path, x), y in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(new), strict=True):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise TypeError(
                f"{must}: state{jax.tree_util.keystr(path)} is {x.dtype}{list(x.shape)} before "
                f"the step and {y.dtype}{list(y.shape)} after it."
            )
    return new, loss.astype(jnp.float32)


def _shapes(tree: Any) -> Any:
    """The tree with shapes and dtypes instead of arrays."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(lambda x: shape(x) if isinstance(x, jax.Array | np.ndarray) else x, tree)


def _layout(batches: Any) -> tuple[bool, int | None]:
    """Whether batches are arrays with a leading axis of steps, and their number if it is known."""
    if isinstance(batches, list):
        return False, len(batches)
    # Iterators and loaders are leaves to JAX too, but it warns about them.
    is_leaf = lambda x: isinstance(x, Iterable) and not isinstance(x, tuple | list | Mapping)
    leaves = jax.tree.leaves(batches, is_leaf=is_leaf)
    if not all(hasattr(x, "shape") for x in leaves):
        return False, None
    sizes = {x.shape[:1] for x in leaves}
    if len(sizes) > 1 or () in sizes:
        raise ValueError(
            "batches must be arrays with one leading axis of steps; their shapes are "
            f"{[x.shape for x in leaves]}. Batches one after another are a list or an iterator."
        )
    return True, sizes.pop()[0] if sizes else None


def _first(batches: Any, total: int) -> Iterator[Any]:
    """The first ``total`` batches of an iterable; ValueError if it has fewer."""
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be arrays, or give one after another, not {batches!r}.")
    given = 0
    for batch in itertools.islice(batches, total):
        given += 1
        yield batch
    if given < total:
        raise ValueError(f"batches ended after {given}, but steps and warmup_steps need {total}.")


def centred_mean(losses: np.ndarray) -> np.ndarray:
    """The finite losses up to the first that is not, each the mean of a tenth of them around it.

    Losses above all of the first tenth count as the highest of those, or a blow-up would reach back
    through the mean.
    """
    broken = np.flatnonzero(~np.isfinite(losses))
    losses = np.asarray(losses, np.float64)[: broken[0] if broken.size else None]
    if losses.size == 0:
        return losses
    return _mean(np.minimum(losses, losses[: _window(losses)].max()))


def _window(x: np.ndarray) -> int:
    return 2 * (x.size // 20) + 1


def _mean(x: np.ndarray) -> np.ndarray:
    mean = lambda y: np.convolve(y, np.ones(_window(x)), mode="same")
    return mean(x) / mean(np.ones_like(x))


def read_curve(rates: np.ndarray, losses: np.ndarray, mode: Mode) -> Suggestions:
    """The suggestions for losses ``[steps]`` at learning rates ``[steps]``, NaN after the stop."""
    curve = centred_mean(losses)
    lowest = int(np.argmin(curve)) if curve.size else 0
    if lowest == 0:
        fell = "the loss never fell: lower the learning rates"
        never = Suggestion(np.nan, fell if curve.size else "no loss was finite")
        return Suggestions(never, never, never)
    rates = np.asarray(rates, np.float64)
    axis = np.log10(rates[: lowest + 1]) if mode == "exponential" else rates[: lowest + 1]
    # The fall begins where a twentieth of it is done.
    begun = curve[0] - 0.05 * (curve[0] - curve[lowest])
    begun = int(np.flatnonzero(curve[:lowest] >= begun)[-1])
    middle = int(np.searchsorted(axis, (axis[begun] + axis[lowest]) / 2))
    slope = _mean(np.gradient(curve[: lowest + 1], axis))  # a second mean: slopes are noisy too
    steepest = begun + int(np.argmin(slope[begun:]))
    still = ""
    if lowest == len(rates) - 1:
        still = "; it was still falling at the last learning rate: raise max_learning_rate"
    fell = f"from {curve[0]:.3g} to {curve[lowest]:.3g}"
    per = "decade of the learning rate" if mode == "exponential" else "learning rate"
    return Suggestions(
        Suggestion(
            float(rates[lowest] / 10),
            f"a tenth of {rates[lowest]:.2g}, where the loss was lowest (it fell {fell}){still}",
        ),
        Suggestion(float(rates[steepest]), f"the loss fell fastest here, per {per}{still}"),
        Suggestion(
            float(rates[middle]),
            f"the middle of the fall, which went {fell} between learning rates "
            f"{rates[begun]:.2g} and {rates[lowest]:.2g}{still}",
        ),
    )


def _grid(results: tuple[RangeTestResult, ...]) -> RangeTestGrid:
    """The results with the weight decay to choose."""
    finite = RangeTestGrid(results, np.nan, "").lowest_losses
    finite = {decay: loss for decay, loss in finite.items() if np.isfinite(loss)}
    curves = (centred_mean(x.losses) for x in results)
    fall = max(np.ptp(curve) for curve in curves if curve.size)
    best = min(finite, key=lambda decay: finite[decay])
    chosen = max(decay for decay in finite if finite[decay] <= finite[best] + 0.01 * fall)
    reason = f"its lowest loss, {finite[chosen]:.3g}, is the lowest of all"
    if chosen != best:
        reason = (
            f"the largest of the weight decays whose lowest losses ({finite[chosen]:.3g}) equal "
            f"the best, {finite[best]:.3g}, within a hundredth of the fall"
        )
    return RangeTestGrid(results, chosen, reason)


def refine_weight_decay(losses: Mapping[float, float]) -> tuple[float, ...]:
    r"""The weight decays to try next: between the best one and its neighbours, halving exponents.

    Between neighbours :math:`a < b` that is :math:`\sqrt{a b}`: 3.16e-4 between 1e-4 and 1e-3.
    Above the largest one tried it is ten times that, and below the smallest positive one a tenth.

    Args:
      losses: Loss of each weight decay tried: early held-out losses, or the ``lowest_losses`` of a
        range test.

    Returns:
      One or two weight decays, ascending.

    Raises:
      ValueError: If no loss is finite, a weight decay is negative, or none is positive.

    Example:
      >>> import lowrank_optax as lro
      >>> losses = {1e-3: 0.42, 1e-4: 0.40, 1e-5: 0.45, 0.0: 0.46}
      >>> print(*(f"{decay:.2e}" for decay in lro.training.refine_weight_decay(losses)))
      3.16e-05 3.16e-04

    Reference:
      Smith, 2018, https://arxiv.org/abs/1803.09820, section 4.4.
    """
    finite = {decay: loss for decay, loss in losses.items() if np.isfinite(loss)}
    tried = sorted(decay for decay in losses if decay > 0)
    if not finite or not tried or min(losses) < 0:
        raise ValueError(
            f"losses={dict(losses)} must have a finite loss, no negative weight decay and at least "
            "one positive one."
        )
    best = min(finite, key=lambda decay: finite[decay])
    if best == 0:
        return (tried[0] / 10,)
    tried = [tried[0] / 100, *tried, tried[-1] * 100]
    at = tried.index(best)
    return float(np.sqrt(tried[at - 1] * best)), float(np.sqrt(best * tried[at + 1]))
