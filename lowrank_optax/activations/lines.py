"""The two lines that a codebook splits: of x, for intervals, and of f'(x), for values."""

import dataclasses
import functools

import numpy as np
from numpy.polynomial import legendre

from lowrank_optax.activations.derivative import Derivative


def dense_grid(slopes: Derivative, points: int) -> np.ndarray:
    """Points on the domain, and all jumps: half even, half as dense as good boundaries are.

    Those of many intervals lie with a density of the cube root of ``w f''**2``.
    """
    width = np.diff(slopes.edges)
    mass = np.maximum(np.diff(slopes.before[0]) / width, 0)
    steep = np.abs(slopes.ends[1] - slopes.ends[0]) / width
    density = np.cbrt(mass * steep**2) * width
    even = width / width.sum()
    density = even if density.sum() == 0 else (even + density / density.sum()) / 2
    reached = np.append(0, np.cumsum(density))
    inner = np.interp(np.linspace(0, reached[-1], points + 1), reached, slopes.edges)
    jumps = slopes.edges[slopes.jumps]
    return np.unique(np.concatenate([inner, jumps, slopes.edges[[0, -1]]]))


class IntervalLine:
    """The line of x; with ``even``, that of ``|x|``, both halves in one."""

    def __init__(self, slopes: Derivative, points: int, even: bool):
        self._slopes, self._even = slopes, even
        grid = dense_grid(slopes, points)
        self.grid = np.unique(np.concatenate([[0], np.abs(grid)])) if even else grid
        self._jumps = slopes.edges[slopes.jumps]

    def integrals(self, at: np.ndarray) -> np.ndarray:
        """See `segmentation.Line`."""
        sums = self._slopes.integrals(at)
        return sums - self._slopes.integrals(-at) if self._even else sums

    def value(self, at: np.ndarray) -> np.ndarray:
        """See `segmentation.Line`."""
        return self._slopes.value(at)

    def rise(self, at: np.ndarray) -> np.ndarray:
        """See `segmentation.Line`."""
        return self._polynomials(at, self._slopes.slope)

    def weight(self, at: np.ndarray) -> np.ndarray:
        """See `segmentation.Line`."""
        one = self._polynomials(at, self._slopes.moments[0])
        return one + self._polynomials(-at, self._slopes.moments[0]) if self._even else one

    def _polynomials(self, at: np.ndarray, of: np.ndarray) -> np.ndarray:
        """The derivative of what these coefficients, [n, cells], say."""
        cell = self._slopes.cell(at)
        per_unit = 2 / np.diff(self._slopes.edges)[cell]
        u = self._slopes.local(at, cell)
        return legendre.legval(u, legendre.legder(of)[:, cell], tensor=False) * per_unit

    def clip(self, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        """See `segmentation.Line`."""
        for jump in self._jumps:
            new = np.where((old - jump) * (new - jump) < 0, jump, new)
        return new

    def settled(self, at: np.ndarray, level: np.ndarray) -> np.ndarray:
        """See `segmentation.Line`."""
        edge = np.searchsorted(self._slopes.edges, at)
        jumps = np.isin(edge, self._slopes.jumps) & (self._slopes.edges[edge] == at)
        left = self._slopes.ends[1, np.maximum(edge - 1, 0)]
        right = self._slopes.ends[0, np.minimum(edge, self._slopes.ends.shape[1] - 1)]
        return jumps & ((left - level) * (right - level) <= 0)


@dataclasses.dataclass(frozen=True)
class _Cells:
    """Cells in the order of the largest value in each."""

    low: np.ndarray
    high: np.ndarray
    order: np.ndarray
    totals: np.ndarray


class ValueLine:
    """The line of the values of ``f'``: up to v lies all x with ``f'(x) <= v``."""

    def __init__(self, slopes: Derivative, points: int):
        self._slopes = slopes
        scale = max(1.0, np.abs(slopes.ends).max())
        grid = dense_grid(slopes, points)
        flat = np.abs(slopes.ends[1] - slopes.ends[0]) < 1e-12
        sides = slopes.ends[0, slopes.jumps], slopes.ends[1, slopes.jumps - 1]
        taken = np.unique(np.concatenate([slopes.value(grid), slopes.ends[0, flat], *sides]))
        taken = taken[np.append(np.diff(taken) > 1e-10 * scale, True)]
        # Between the values taken: what a flat piece holds lies on one side of each point.
        between = (taken[1:] + taken[:-1]) / 2
        self.grid = np.concatenate([[taken[0] - scale], between, [taken[-1] + scale]])
        self._step = 1e-7 * scale

    @functools.cached_property
    def _cells(self) -> _Cells:
        low, high = self._slopes.ends.min(axis=0), self._slopes.ends.max(axis=0)
        flat = high - low < 1e-12
        low, high = np.where(flat, high, low), high
        order = np.argsort(high)
        totals = np.diff(self._slopes.before, axis=1)[:, order]
        return _Cells(low, high, order, np.cumsum(np.pad(totals, ((0, 0), (1, 0))), axis=1))

    def integrals(self, at: np.ndarray) -> np.ndarray:
        """See `segmentation.Line`."""
        cells, slopes = self._cells, self._slopes
        sums = cells.totals[:, np.searchsorted(cells.high[cells.order], at, "right")]
        place, cell = np.nonzero((cells.low < at[:, None]) & (at[:, None] < cells.high))
        here = slopes.integrals(slopes.solve(at[place], cell), cell)
        rising = slopes.ends[1, cell] > slopes.ends[0, cell]
        left, right = slopes.before[:, cell], slopes.before[:, cell + 1]
        parts = np.where(rising, here - left, right - here)
        return sums + np.stack([np.bincount(place, part, at.size) for part in parts])

    def value(self, at: np.ndarray) -> np.ndarray:
        """See `segmentation.Line`."""
        return at

    def rise(self, at: np.ndarray) -> np.ndarray:
        """See `segmentation.Line`."""
        return np.ones_like(at)

    def weight(self, at: np.ndarray) -> np.ndarray:
        """See `segmentation.Line`."""
        ends = self.integrals(np.concatenate([at - self._step, at + self._step]))[0]
        return (ends[at.size :] - ends[: at.size]) / (2 * self._step)

    def clip(self, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        """See `segmentation.Line`."""
        return new

    def settled(self, at: np.ndarray, level: np.ndarray) -> np.ndarray:
        """See `segmentation.Line`."""
        return np.zeros(at.shape, bool)
