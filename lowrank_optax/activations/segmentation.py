"""The best split of a line into segments with one level each: dynamic programming, then Newton.

What is approximated is known by three running integrals along the line: of the weight, of the value
times the weight, and of its square. A segment's best level is its mean; its error follows.
"""

from typing import Protocol

import numpy as np


class Line(Protocol):
    """What is split.

    `grid` are points of it, increasing, both ends included; boundaries lie strictly between.
    """

    grid: np.ndarray

    def integrals(self, at: np.ndarray) -> np.ndarray:
        """Of the weight, the weighted value and its square, from the left end: [3, ...]."""
        ...

    def value(self, at: np.ndarray) -> np.ndarray:
        """What is approximated."""
        ...

    def rise(self, at: np.ndarray) -> np.ndarray:
        """The derivative of `value`."""
        ...

    def weight(self, at: np.ndarray) -> np.ndarray:
        """The derivative of the first integral."""
        ...

    def clip(self, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        """``new``, but stopped at the first jump of the value that is in the way from ``old``."""
        ...

    def settled(self, at: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Where the value jumps across a level, so that no boundary between would do better."""
        ...


def split(line: Line, most: int) -> np.ndarray:
    """The boundaries of at most so many segments: as few as the least error needs."""
    chosen = best_path(line.integrals(line.grid), most)
    return polish(line, line.grid[chosen])


def best_path(sums: np.ndarray, most: int) -> np.ndarray:
    r"""The grid points, by number, at which the best segments meet: exact on the grid.

    :math:`D(j, m) = \min_{i<j} D(i, m-1) + \mathrm{cost}(i, j)` for all pairs: where the value is
    not monotone along the line, the cost is no Monge array and no shorter way is right.

    Args:
      sums: The integrals up to each grid point, [3, n + 1].
      most: Segments, at most.
    """
    n = sums.shape[1] - 1
    cost = _costs(sums)
    best, back = cost[:, 0].copy(), []
    trivial = 1e-12 * best[-1] + 1e-15 * sums[2, -1]
    while best[-1] > trivial and len(back) + 1 < min(most, n):
        previous, best = best, np.full(n + 1, np.inf)
        source = np.zeros(n + 1, np.int64)
        for stop in range(0, n + 1, 256):  # blocks of j, with what lies left of them
            rows = slice(stop, min(stop + 256, n + 1))
            total = cost[rows, : rows.stop] + previous[: rows.stop]
            source[rows] = total.argmin(axis=1)
            best[rows] = np.take_along_axis(total, source[rows, None], axis=1)[:, 0]
        back.append(source)
    path, j = [], n
    for source in reversed(back):
        j = source[j]
        path.append(j)
    return np.array(path[::-1], np.int64)


def _costs(sums: np.ndarray) -> np.ndarray:
    """``[j, i]``: the error of one level from i to j; infinite where it is no segment."""
    weight, first, second = (s[:, None] - s[None, :] for s in sums)
    cost = np.zeros(weight.shape)
    np.divide(first**2, weight, out=cost, where=weight > 0)
    np.maximum(second - cost, 0, out=cost)
    cost[np.triu_indices(len(cost))] = np.inf
    cost[0, 0] = 0
    return cost


def means(line: Line, at: np.ndarray) -> np.ndarray:
    """The best level of each segment; 0 where the weight is 0."""
    return _means(_segments(line, at))


def _segments(line: Line, at: np.ndarray) -> np.ndarray:
    """The three integrals over each."""
    ends = np.concatenate([line.grid[:1], at, line.grid[-1:]])
    return np.diff(line.integrals(ends), axis=1)


def _means(segments: np.ndarray) -> np.ndarray:
    weight, first, _ = segments
    return np.divide(first, weight, out=np.zeros_like(first), where=weight > 0)


def polish(line: Line, at: np.ndarray, steps: int = 200) -> np.ndarray:
    """Boundaries at a least error nearby: the value at each is the mean of both its levels.

    Newton's method, its Jacobian (tridiagonal) damped until the error falls.
    """
    if not at.size:
        return at
    error, residual, jacobian, damping = _stationarity(line, at)
    ridge, rounding = 0.0, 1e-14 * line.integrals(line.grid[-1:])[2, 0]
    for _ in range(steps):
        move = np.linalg.solve(jacobian + ridge * np.diag(damping), -residual)
        new = line.clip(at, at + move)
        if _increasing(line, new):
            trial = _stationarity(line, new)
            closer = np.abs(trial[1]).max() < np.abs(residual).max()
            if trial[0] < error or (trial[0] < error + rounding and closer):
                size = np.abs(new - at).max()
                at, (error, residual, jacobian, damping) = new, trial
                ridge = ridge / 10 if ridge > 1e-3 else 0.0
                if size < 1e-13 * (line.grid[-1] - line.grid[0]):
                    break
                continue
        if ridge > 1e8:
            break
        ridge = max(10 * ridge, 1e-2)
    return at


def _increasing(line: Line, at: np.ndarray) -> bool:
    return bool(np.diff(np.concatenate([line.grid[:1], at, line.grid[-1:]])).min() > 0)


def _stationarity(line: Line, at: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """The error; ``value - mean of both levels`` at each boundary; its Jacobian; its diagonal."""
    segments = _segments(line, at)
    level, mass = _means(segments), np.maximum(segments[0], 1e-300)
    error = float(np.sum(segments[2] - level * segments[1]))
    middle, gap = (level[1:] + level[:-1]) / 2, np.diff(level)
    value, rise, weight = line.value(at), line.rise(at), line.weight(at)
    # How the level below a boundary, and that above, change with it.
    below = weight * (value - level[:-1]) / mass[:-1]
    above = -weight * (value - level[1:]) / mass[1:]
    jacobian = np.diag(rise - (below + above) / 2)
    if at.size > 1:
        jacobian -= np.diag(below[1:] / 2, 1) + np.diag(above[:-1] / 2, -1)
    damping = np.where(gap < 0, -1, 1) * np.maximum(np.abs(rise), 1e-6)
    residual = value - middle
    fixed = line.settled(at, middle)
    residual[fixed], damping[fixed] = 0, 1
    jacobian[fixed] = np.eye(at.size)[fixed]
    return error, residual, jacobian, damping
