"""Runs the steps of a range test: in one scan, or one by one."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LOOKS_AFTER = 10  # steps of the Python loop between two looks at whether all runs have stopped


class RangeTest(NamedTuple):
    """What a step of the test needs to know.

    Attributes:
      step_fn: The user's step.
      smoothing: Decay of the smoothed loss.
      stop_factor: How far above the lowest it may be.
      decay: A weight decay, several ``[decays]``, or None.
    """

    step_fn: Callable[..., tuple[Any, Any]]
    smoothing: float
    stop_factor: float
    decay: jax.Array | None

    @property
    def axes(self) -> int | None:
        """Where weight decays and all that comes of them have an axis."""
        return 0 if self.decay is not None and self.decay.ndim else None


class Inputs(NamedTuple):
    """Of a step, or stacked: a batch, its number (below 0 in the warm-up), the learning rate."""

    batch: Any
    index: Any
    learning_rate: Any


class Curve(NamedTuple):
    """Of a step, or stacked: the loss, smoothed, and whether the run has blown up since."""

    losses: Any
    smoothed: Any
    stopped: Any


class _Carry(NamedTuple):
    """The state of the training, and that of the test."""

    state: Any
    average: jax.Array
    best: jax.Array
    stopped: jax.Array


def scanned(test: RangeTest, state: Any, inputs: Inputs) -> Curve:
    """The test by `lax.scan`, over inputs with a leading axis; curves ``[(decays,) steps]``."""

    _check_step(test, state, jax.tree.map(lambda x: x[0], inputs))

    def run(state: Any, inputs: Inputs, decay: Any) -> Curve:
        body = lambda carry, x: _advance(test, carry, x, decay)
        return jax.lax.scan(body, _start(state), inputs)[1]

    if test.axes is not None:
        run = jax.vmap(run, (None, None, 0))
    return jax.jit(run)(state, inputs, test.decay)


def looped(test: RangeTest, state: Any, steps: Iterator[Inputs]) -> Curve:
    """The test by one compiled step, over inputs one by one."""
    copy = lambda x: x.copy() if isinstance(x, jax.Array) else jnp.array(x)
    carry = _start(jax.tree.map(copy, state))  # the step donates it
    step = lambda carry, inputs, decay: _advance(test, carry, inputs, decay)
    if test.axes is not None:
        carry = jax.vmap(lambda _: carry)(test.decay)
        step = jax.vmap(step, (0, None, 0))
    step = jax.jit(step, donate_argnums=0)
    curve = []
    for number, inputs in enumerate(steps, 1):
        if number == 1:
            _check_step(test, state, inputs)
        carry, point = step(carry, inputs, test.decay)
        curve.append(point)
        # A step after the stop does nothing, so looking late changes nothing.
        if number % LOOKS_AFTER == 0 and bool(point.stopped.all()):
            break
    return jax.tree.map(lambda *points: jnp.stack(points, axis=-1), *curve)


def _check_step(test: RangeTest, state: Any, inputs: Inputs) -> None:
    """Refuses a step that returns another state than it takes, or no scalar loss.

    Raises:
      TypeError: Says what it returned.
    """
    decay = None if test.decay is None else jax.ShapeDtypeStruct((), jnp.float32)
    returned = jax.eval_shape(lambda *args: _call(test, *args), state, inputs, decay)
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(f"step_fn must return (state, loss), not {returned}.")
    new, loss = returned
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(f"step_fn must return (state, loss) with a scalar loss, not {loss}.")
    old = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state))
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise TypeError(
            f"step_fn must return a state like the one it takes, {jax.tree.structure(old)}, not "
            f"{jax.tree.structure(new)}."
        )
    for (path, x), y in zip(jax.tree.leaves_with_path(old), jax.tree.leaves(new), strict=True):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise TypeError(
                f"step_fn must return a state like the one it takes: state"
                f"{jax.tree_util.keystr(path)} is {x.dtype}{list(x.shape)} before the step and "
                f"{y.dtype}{list(y.shape)} after it."
            )


def _call(test: RangeTest, state: Any, inputs: Inputs, decay: Any) -> tuple[Any, Any]:
    extra = () if decay is None else (decay,)
    return test.step_fn(state, inputs.batch, inputs.learning_rate, *extra)


def _start(state: Any) -> _Carry:
    state = jax.tree.map(jnp.asarray, state)
    return _Carry(state, jnp.zeros([]), jnp.full([], jnp.inf), jnp.zeros([], bool))


def _advance(test: RangeTest, carry: _Carry, inputs: Inputs, decay: Any) -> tuple[_Carry, Curve]:
    def step() -> tuple[Any, jax.Array]:
        state, loss = _call(test, carry.state, inputs, decay)
        return state, loss.astype(jnp.float32)

    state, loss = jax.lax.cond(carry.stopped, lambda: (carry.state, jnp.float32(jnp.nan)), step)
    recorded = inputs.index >= 0
    average = test.smoothing * carry.average + (1 - test.smoothing) * loss
    average = jnp.where(recorded, average, carry.average)
    smoothed = average / (1 - jnp.float32(test.smoothing) ** (jnp.maximum(inputs.index, 0) + 1))
    # For losses below zero too: as far above the lowest as stop_factor times it would be.
    limit = carry.best + (test.stop_factor - 1) * jnp.abs(carry.best)
    stopped = carry.stopped | ~jnp.isfinite(loss) | (recorded & (smoothed > limit))
    best = jnp.where(recorded, jnp.fmin(carry.best, smoothed), carry.best)
    return _Carry(state, average, best, stopped), Curve(loss, smoothed, stopped)


def is_stacked(batches: Any) -> bool:
    """Whether batches are arrays with a leading axis of steps, and not given one after another."""
    # Iterators and loaders are leaves to JAX too, but it warns of them.
    is_leaf = lambda x: isinstance(x, Iterable) and not isinstance(x, tuple | list | Mapping)
    leaves = jax.tree.leaves(batches, is_leaf=is_leaf)
    return not isinstance(batches, list) and all(hasattr(x, "shape") for x in leaves)


def count(batches: Any) -> int | None:
    """How many batches there are; None of an iterator, a data loader, or where none are needed.

    Raises:
      ValueError: If stacked arrays differ in their leading axis, or lack it.
    """
    if isinstance(batches, list):
        return len(batches)
    if not is_stacked(batches):
        return None
    sizes = {x.shape[0] if x.shape else None for x in jax.tree.leaves(batches)}
    if len(sizes) > 1 or None in sizes:
        raise ValueError(
            "batches must be arrays with one leading axis of steps; their shapes are "
            f"{[x.shape for x in jax.tree.leaves(batches)]}. Batches one after another are a list "
            "or an iterator."
        )
    return next(iter(sizes), None)


def one_by_one(batches: Any, total: int) -> Iterator[Any]:
    """So many batches.

    Raises:
      ValueError: If there are fewer.
    """
    if is_stacked(batches):
        yield from (jax.tree.map(lambda x, i=i: x[i], batches) for i in range(total))
        return
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be arrays, or give one after another, not {batches!r}.")
    ended = object()
    for i, batch in enumerate(itertools.islice(itertools.chain(batches, [ended]), total)):
        if batch is ended:
            raise ValueError(f"batches ended after {i}, but steps and warmup_steps need {total}.")
        yield batch


def stacked(batches: Any, total: int) -> Any:
    """So many batches, with a leading axis."""
    if is_stacked(batches):
        return jax.tree.map(lambda x: x[:total], batches)
    return jax.tree.map(lambda *x: jnp.stack(x), *one_by_one(batches, total))
