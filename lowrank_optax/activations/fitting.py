"""The best steps for a derivative: dynamic programming on a grid, then Lloyd's algorithm.

``python -m lowrank_optax.activations.fitting`` writes the shipped tables, in some minutes.
"""

from collections.abc import Callable
import dataclasses
import functools
import gzip
import itertools
import json
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from lowrank_optax.activations.codebooks import (
    DOMAIN,
    FUNCTIONS,
    TABLES,
    Codebook,
    Coding,
    DensityName,
)
from lowrank_optax.activations.sampling import Samples, Slopes, gradient, sample

GRID = 2048


def fit(
    fn: Callable[[jax.Array], jax.Array], bits: int, density: Any, domain: float, coding: Coding
) -> Codebook:
    """See `codebook`; always fitted again."""
    if not callable(fn):
        raise TypeError(f"fn={fn!r} must take a number to a number.")
    slopes_at = gradient(fn)
    samples = sample(slopes_at, domain, density)
    return _on_float32(fit_steps(samples, bits, coding), samples, slopes_at)


@functools.lru_cache(maxsize=256)
def fit_once(
    fn: Callable[[jax.Array], jax.Array], bits: int, density: str, domain: float, coding: Coding
) -> Codebook:
    """`fit`, remembered."""
    return fit(fn, bits, density, domain, coding)


def fit_steps(samples: Samples, bits: int, coding: Coding, *, parity: bool = True) -> Codebook:
    """The best steps for a derivative.

    Args:
      samples: The derivative.
      bits: 1 to 8.
      coding: ``"value"`` or ``"interval"``.
      parity: Whether ``coding="interval"`` may code ``|x|`` where the derivative is even.
    """
    if coding == "value":
        at, codes, levels = _values(samples, 2**bits)
    else:
        at, codes, levels = _intervals(samples, 2**bits, parity and samples.is_even())
    mirrored = -at[::-1]
    if at.size and np.abs(at - mirrored).max() < 1e-8:
        at = (at + mirrored) / 2  # 0 is then a boundary exactly, or it is not one
    # To 11 digits of the largest, so that rounding does not show in slopes of 0 and 1.
    scale = np.abs(levels).max() or 1.0
    levels = np.round(levels / scale, 11) * scale if scale != 1 else np.round(levels, 11)
    boundaries, codes, levels = (tuple(x.tolist()) for x in (at, codes, levels))
    book = Codebook(boundaries, codes, levels, bits)
    return dataclasses.replace(book, error=squared_error(book, samples))


def squared_error(book: Codebook, samples: Samples) -> float:
    """The integral of the squared error over the density."""
    ends = np.concatenate([samples.x[:1], book.boundaries, samples.x[-1:]])
    weight, first, second = np.diff(samples.integrals(ends), axis=1)
    level = np.array(book.levels)[list(book.codes)]
    return max(0.0, float(np.sum(second - 2 * level * first + level**2 * weight)))


def _intervals(samples: Samples, most: int, even: bool) -> tuple[np.ndarray, ...]:
    """Boundaries, codes and levels with a code for each interval of x, or of ``|x|``."""
    folded = lambda x: samples.integrals(x) - (samples.integrals(-x) if even else 0)
    grid = _dense_grid(samples)
    if even:
        grid = grid[samples.x[grid] > 0]
        sums = np.concatenate([np.zeros((3, 1)), folded(samples.x[grid])], axis=1)
    else:
        sums = samples.sums[:, grid]
    chosen = grid[best_path(sums, most) - even]
    # A boundary is known by the value that it is at, and by the turns that it is between.
    branches = np.searchsorted(samples.turns, chosen, "right") - 1
    values = (samples.slope[chosen] + samples.slope[chosen + np.isin(chosen, samples.jumps)]) / 2

    def boundaries(values: np.ndarray) -> np.ndarray:
        at = np.zeros_like(values)
        for branch in set(branches):
            here = branches == branch
            at[here] = samples.crossing(branch, values[here])
        return at

    values, levels = _polish(lambda values: folded(boundaries(values)), sums[:, -1], values)
    at, codes = boundaries(values), np.arange(levels.size)
    if even:
        return np.concatenate([-at[::-1], at]), np.concatenate([codes[:0:-1], codes]), levels
    return at, codes, levels


def _values(samples: Samples, most: int) -> tuple[np.ndarray, ...]:
    """Boundaries, codes and levels with a code for each interval of ``f'``."""
    slope, turns = samples.slope, samples.turns
    scale = max(1.0, np.abs(slope).max())
    taken = np.unique(slope[np.append(_dense_grid(samples), samples.jumps + 1)])
    taken = taken[np.append(np.diff(taken) > 1e-10 * scale, True)]
    # Between the values taken: what a flat piece holds lies on one side of each point.
    grid = np.concatenate([taken[:1] - 1, (taken[1:] + taken[:-1]) / 2, taken[-1:] + 1])
    ends = samples.sums[:, turns]

    def integrals(values: np.ndarray) -> np.ndarray:
        """Over all x at which ``f'`` is below a value."""
        total = np.zeros((3, values.size))
        for branch, (start, stop) in enumerate(itertools.pairwise(turns)):
            here = samples.integrals(samples.crossing(branch, values))
            rising = slope[stop] >= slope[start]
            total += here - ends[:, [branch]] if rising else ends[:, [branch + 1]] - here
        return total

    sums = integrals(grid)
    thresholds, levels = _polish(integrals, sums[:, -1], grid[best_path(sums, most)])
    side = np.searchsorted(thresholds, slope[turns])
    at, codes = [-np.inf], [side[0]]
    for branch, (first, last) in enumerate(itertools.pairwise(side)):
        way = 1 if last > first else -1
        after = np.arange(first + way, last + way, way) if last != first else np.zeros(0, int)
        at.extend(samples.crossing(branch, thresholds[np.minimum(after, after - way)]))
        codes.extend(after)
    # Without intervals of no width, where a jump crosses several thresholds.
    starts, codes = np.array(at), np.array(codes)
    wide = np.diff(np.append(starts, np.inf)) > 1e-11 * samples.x[-1]
    starts, codes = starts[wide], codes[wide]
    differ = np.append(True, np.diff(codes) != 0)
    return starts[differ][1:], codes[differ], levels


def _dense_grid(samples: Samples) -> np.ndarray:
    """Indices of samples, with all jumps: half even, half as dense as good boundaries are.

    Those of many intervals lie with a density of the cube root of ``w f''**2``.
    """
    width = np.diff(samples.x)
    density = np.cbrt(np.maximum(np.diff(samples.sums[0]), 0) * np.diff(samples.slope) ** 2)
    density[samples.jumps] = 0
    even = width / width.sum()
    density = even if density.sum() == 0 else (even + density / density.sum()) / 2
    reached = np.append(0, np.cumsum(density))
    inner = np.searchsorted(reached, np.linspace(0, reached[-1], GRID + 1)[1:-1])
    return np.unique(np.concatenate([[0], inner, samples.jumps, [samples.x.size - 1]]))


def best_path(sums: np.ndarray, most: int) -> np.ndarray:
    r"""The grid points, by number, at which the best segments meet: exact on the grid.

    :math:`D(j, m) = \min_{i<j} D(i, m-1) + \mathrm{cost}(i, j)` for all pairs: where the value is
    not monotone along the line, the cost is no Monge array and no shorter way is right.

    Args:
      sums: Integrals of the weight, of the value times the weight, and of its square, up to each
        grid point, [3, n + 1].
      most: Largest number of segments; there are no more than the least error needs.
    """
    n = sums.shape[1] - 1
    weight, first, second = (s[:, None] - s[None, :] for s in sums)
    cost = np.zeros(weight.shape)  # [j, i]: that of one level from i to j
    np.divide(first**2, weight, out=cost, where=weight > 0)
    np.maximum(second - cost, 0, out=cost)
    cost[np.triu_indices(len(cost))] = np.inf
    cost[0, 0] = 0
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


def _polish(
    integrals: Callable[[np.ndarray], np.ndarray], total: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The values at the boundaries at a least error nearby, and the levels.

    There, each value is the mean of the levels on both sides: Lloyd's algorithm takes that mean
    again and again, and Newton's method solves for it where that comes closer.

    Args:
      integrals: The three integrals up to each boundary, of the values there, [3, m].
      total: The integrals over everything, [3].
      values: The values at the boundaries to start from, [m].
    """

    def means(values: np.ndarray) -> np.ndarray:
        ends = np.concatenate([np.zeros((3, 1)), integrals(values), total[:, None]], axis=1)
        weight, first, _ = np.diff(ends, axis=1)
        return np.divide(first, weight, out=np.zeros_like(first), where=weight > 0)

    def lloyd(values: np.ndarray) -> np.ndarray:
        levels = means(values)
        return (levels[1:] + levels[:-1]) / 2

    number = np.arange(values.size)
    new = lloyd(values)
    for _ in range(100 if values.size else 0):
        off = np.abs(new - values).max()
        if off < 1e-12:
            break
        # Each mean depends on three values, so three differences give all derivatives.
        jacobian, step = np.eye(values.size), 1e-7
        for column in range(3):
            mine = number % 3 == column
            change = (lloyd(values + step * mine) - new) / step
            near = np.abs(number[:, None] - number) <= 1
            jacobian -= np.where(near & mine, change[:, None], 0)
        newton = values + np.linalg.solve(jacobian, new - values)
        trial = lloyd(newton)
        closer = np.abs(trial - newton).max() < off
        values, new = (newton, trial) if closer else (new, lloyd(new))
    return values, means(values)


def _on_float32(book: Codebook, samples: Samples, slopes_at: Slopes) -> Codebook:
    """With boundaries at jumps of ``f'`` where the float32 numbers begin that belong above.

    Those near a jump go to the side that ``jax.grad`` puts them on, the jump itself above all.
    """
    at, jumps = list(book.boundaries), samples.x[samples.jumps]
    for i, boundary in enumerate(at):
        if not jumps.size or np.abs(jumps - boundary).min() > 1e-12 * samples.x[-1]:
            continue
        near = _float32_near(boundary if abs(boundary) > 1e-12 * samples.x[-1] else 0.0)
        values = slopes_at(near)
        below, above = (book.levels[code] for code in book.codes[i : i + 2])
        is_below = np.flatnonzero(np.abs(values - below) <= np.abs(values - above))
        if is_below.size:
            at[i] = float(near[is_below[-1]])
    return dataclasses.replace(book, boundaries=tuple(at))


def _float32_near(x: float, steps: int = 1000) -> np.ndarray:
    """Neighbours on both sides, without subnormal ones, which most devices take for zeros."""
    here, tiny = np.float32(x), np.finfo(np.float32).tiny
    if abs(here) < tiny:
        return np.array([-tiny, 0, tiny], np.float32)
    size = np.abs(here)[None].view(np.int32) + np.arange(-steps, steps + 1, dtype=np.int32)
    return np.sort(np.sign(here) * size.view(np.float32))


def rows(name: str, most_bits: int = 8) -> dict[str, Any]:
    """All codebooks of a known function: by density and coding, a list by ``bits - 1``."""
    slopes_at, found = gradient(FUNCTIONS[name]), {}
    rounded = lambda x: float(f"{x:.9g}")  # tells float32 numbers apart
    for density in get_args(DensityName):
        samples = sample(slopes_at, DOMAIN, density)
        for coding in get_args(Coding):
            made = (fit_steps(samples, bits, coding) for bits in range(1, most_bits + 1))
            books = [_on_float32(book, samples, slopes_at) for book in made]
            found.setdefault(density, {})[coding] = [
                [
                    [*map(rounded, x.boundaries)],
                    x.codes,
                    [*map(rounded, x.levels)],
                    rounded(x.error),
                ]
                for x in books
            ]
    return found


def _write_tables() -> None:
    lines = [f'"{name}": {json.dumps(rows(name))}' for name in sorted(FUNCTIONS)]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (Path(__file__).parent / TABLES).write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    _write_tables()
