"""The derivative of a function of one number, in float64: samples, and integrals between them.

Between two samples the derivative is taken to be a straight line. A million samples make that true
to about 11 digits; where the derivative jumps, there is a sample on each side.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import functools
import itertools
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

DensityName: TypeAlias = Literal["uniform", "normal"]
Slopes: TypeAlias = Callable[[np.ndarray], np.ndarray]
Masses: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""From increasing points to the integrals of a density between them."""

_SAMPLES = 2**20
_FLAT = 1e-6  # what a derivative may move up and down by, of its largest size, and be monotone


def outside_of_traces(work: Callable[[], Any]) -> Any:
    """What ``work()`` computes, on the CPU if JAX has it, while a program is being traced or not.

    In a thread of its own: there, no trace is under way, and the precision is nobody else's.
    """

    def run() -> Any:
        try:  # a TPU has no float64 proper, and a CPU may be disabled
            cpu = jax.local_devices(backend="cpu")[0]
        except RuntimeError:
            cpu = None
        with jax.default_device(cpu), jax.debug_nans(False):
            return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def gradient(fn: Callable[[Any], Any]) -> Slopes:
    """``jax.grad(fn)`` for NumPy arrays of any shape, in their dtype; also while tracing."""
    compiled = jax.jit(jax.vmap(jax.grad(fn)))

    def work(x: np.ndarray) -> np.ndarray:
        with jax.enable_x64(x.dtype == np.float64):
            try:
                out = jax.eval_shape(fn, jax.ShapeDtypeStruct((), x.dtype))
            except Exception as error:
                raise TypeError(
                    f"fn={fn!r} must take a number to a number; it raised: {error}"
                ) from error
            if not isinstance(out, jax.ShapeDtypeStruct) or out.shape or out.dtype.kind != "f":
                raise TypeError(f"fn={fn!r} must take a number to a real number, not to {out}.")
            # Padded to a power of two, so that few shapes are compiled.
            padded = np.full(max(1 << (x.size - 1).bit_length(), 1024), x.flat[0], x.dtype)
            padded[: x.size] = x.ravel()
            return np.asarray(compiled(padded))[: x.size].reshape(x.shape)

    return lambda x: outside_of_traces(lambda: work(x))


def density_masses(density: Any, domain: float) -> Masses:
    """The density of a name or of measured inputs, as its integrals.

    Raises:
      ValueError: If the name is unknown; if there are no samples, or some are not finite, or all
        lie off the domain.
    """
    if isinstance(density, str):
        if density == "uniform":
            return np.diff
        if density == "normal":
            at = lambda x: np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
            return lambda x: np.diff(x) * (at(x[1:]) + at(x[:-1])) / 2
        raise ValueError(
            f"density={density!r} must be 'uniform', 'normal' or an array of measured inputs."
        )
    samples = np.asarray(density, np.float64).ravel()
    if not samples.size:
        raise ValueError("density holds no samples.")
    if not np.isfinite(samples).all():
        bad = np.count_nonzero(~np.isfinite(samples))
        raise ValueError(f"density holds {bad} samples of {samples.size} that are not finite.")
    inside = samples[np.abs(samples) <= domain]
    if not inside.size:
        raise ValueError(
            f"density: all {samples.size} samples lie off the domain, [{-domain:g}, {domain:g}]."
        )
    # A histogram with bins of equal width and of equal share alike: fine where there are many.
    shares = np.quantile(inside, np.linspace(0, 1, 257))
    repeated = shares[1:][np.diff(shares) == 0]  # as the zeros behind a relu: a bin of its own
    parts = [np.linspace(-domain, domain, 321), shares, repeated + 1e-4 * domain]
    edges = np.unique(np.clip(np.concatenate(parts), -domain, domain))
    edges = edges[np.append(np.diff(edges) > 1e-6 * domain, True)]
    edges[0] = -domain
    reached = np.append(0, np.cumsum(np.histogram(inside, edges)[0])) / inside.size
    return lambda x: np.diff(np.interp(x, edges, reached))


@dataclasses.dataclass(frozen=True)
class Samples:
    """``f'`` on the domain, and its integrals.

    Attributes:
      x: Points of the domain, increasing, both ends included.
      slope: ``f'`` there.
      sums: Integrals of the density times 1, ``f'``, ``f'**2`` up to each point, [3, n].
      jumps: Index of the last point before each jump; the next one is at the same place.
      turns: Indices of the points between which ``f'`` is monotone, both ends included.
    """

    x: np.ndarray
    slope: np.ndarray
    sums: np.ndarray
    jumps: np.ndarray
    turns: np.ndarray

    def integrals(self, x: np.ndarray) -> np.ndarray:
        """Integrals of the density times 1, ``f'``, ``f'**2`` up to x, [3, ...]."""
        i = np.clip(np.searchsorted(self.x, x, "right") - 1, 0, self.x.size - 2)
        width = self.x[i + 1] - self.x[i]
        part = np.divide(x - self.x[i], width, out=np.zeros(np.shape(x)), where=width > 0)
        left = self.slope[i]
        here = left + part * (self.slope[i + 1] - left)
        mass = part * (self.sums[0, i + 1] - self.sums[0, i])
        return self.sums[:, i] + np.stack(_moments(mass, left, here))

    def crossing(self, branch: int, value: np.ndarray) -> np.ndarray:
        """Where ``f'`` takes a value between two turns; the end that is nearer where it does not."""
        slope, x = self._branches[branch]
        return np.interp(value, slope, x)

    @functools.cached_property
    def _branches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """``f'``, increasing, and x between two turns."""
        found = []
        for start, stop in itertools.pairwise(self.turns):
            x, slope = self.x[start : stop + 1], self.slope[start : stop + 1]
            if slope[0] > slope[-1]:
                x, slope = x[::-1], slope[::-1]
            found.append((np.maximum.accumulate(slope), np.ascontiguousarray(x)))
        return found

    def is_even(self) -> bool:
        """Whether ``f'(-x)`` is ``f'(x)``."""
        middles = (self.x[1:] + self.x[:-1])[:: self.x.size // 4096] / 2
        left, right = (np.interp(x, self.x, self.slope) for x in (-middles, middles))
        return bool(np.abs(left - right).max() < 1e-6 * max(1.0, np.abs(self.slope).max()))


def _moments(mass: np.ndarray, left: np.ndarray, right: np.ndarray) -> list[np.ndarray]:
    """Integrals of 1, y and y² over an even mass, where y goes from left to right on a line."""
    return [mass, mass * (left + right) / 2, mass * (left**2 + left * right + right**2) / 3]


def sample(slopes_at: Slopes, domain: float, density: Any) -> Samples:
    """Samples of the derivative that `gradient` gives, on [-domain, domain].

    Args:
      slopes_at: The derivative.
      domain: Half the width of the domain.
      density: A name, or measured inputs.

    Raises:
      ValueError: If the derivative is not finite somewhere, or the density is not one.
    """
    masses = density_masses(density, domain)
    step = 2 * domain / _SAMPLES
    inner = (np.arange(_SAMPLES) + 0.5) * step - domain  # not 0, where many have a kink
    x = np.concatenate([[-domain], inner, [domain]])
    slope = slopes_at(x)
    if not np.isfinite(slope).all():
        bad = x[~np.isfinite(slope)]
        raise ValueError(
            f"The derivative of fn is not finite at x = {bad[np.abs(bad).argmin()]:.6g}: fit on "
            "another domain."
        )
    scale = max(1.0, np.abs(slope).max())
    steep = np.flatnonzero(np.abs(np.diff(slope)) > 1e-4 * scale)
    low, high, below, above = _bisected(slopes_at, x, slope, steep)
    is_jump = np.abs(above - below) > np.abs(np.diff(slope)[steep]) / 2
    at = np.repeat(steep[is_jump] + 1, 2)
    x = np.insert(x, at, np.stack([low, high], 1)[is_jump].ravel())
    slope = np.insert(slope, at, np.stack([below, above], 1)[is_jump].ravel())
    jumps = steep[is_jump] + 1 + 2 * np.arange(is_jump.sum())
    moments = np.stack(_moments(masses(x), slope[:-1], slope[1:]))
    sums = np.zeros((3, x.size))
    sums[:, 1:] = np.cumsum(moments, axis=1, dtype=np.longdouble)
    return Samples(x, slope, sums, jumps, _turns(slope, _FLAT * scale))


def _bisected(
    slopes_at: Slopes, x: np.ndarray, slope: np.ndarray, cells: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The points next to the steepest place in each cell, and ``f'`` there."""
    low, high, below, above = x[cells], x[cells + 1], slope[cells], slope[cells + 1]
    for _ in range(60 if cells.size else 0):
        middle = (low + high) / 2
        here = slopes_at(middle)
        left = np.abs(here - below) > np.abs(above - here)
        low, below = np.where(left, low, middle), np.where(left, below, here)
        high, above = np.where(left, middle, high), np.where(left, here, above)
    return low, high, below, above


def _turns(slope: np.ndarray, tolerance: float) -> np.ndarray:
    """Indices of both ends, and of where values turn back by more than a tolerance."""
    moves = np.sign(np.diff(slope))
    moving = np.flatnonzero(moves)
    changes = [b for a, b in itertools.pairwise(moving) if moves[a] != moves[b]]
    turns, low, high, rising = [0], 0, 0, None
    for i in (*changes, slope.size - 1):
        low, high = (i if slope[i] < slope[low] else low), (i if slope[i] > slope[high] else high)
        if rising is not False and slope[high] - slope[i] > tolerance:
            turns += [high] if rising else []
            rising, low = False, i
        elif rising is not True and slope[i] - slope[low] > tolerance:
            turns += [] if rising is None else [low]
            rising, high = True, i
    return np.array([*turns, slope.size - 1])
