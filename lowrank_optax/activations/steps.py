"""From a split of a line to steps along x, and what they become in float32."""

from collections.abc import Callable
import dataclasses
import itertools

import numpy as np

from lowrank_optax.activations.derivative import Derivative
from lowrank_optax.activations.step_function import Codebook


@dataclasses.dataclass(frozen=True)
class Steps:
    """A step function on the domain, float64; see `Codebook` for the fields."""

    boundaries: np.ndarray
    codes: np.ndarray
    levels: np.ndarray

    def error(self, slopes: Derivative) -> float:
        """The integral of the squared error over the density."""
        ends = np.concatenate([slopes.edges[:1], self.boundaries, slopes.edges[-1:]])
        weight, first, second = np.diff(slopes.integrals(ends), axis=1)
        level = self.levels[self.codes]
        return max(0.0, float(np.sum(second - 2 * level * first + level**2 * weight)))

    def mirrored(self) -> "Steps":
        """Boundaries exactly so, where they are nearly: 0 is then one, or none."""
        other = -self.boundaries[::-1]
        near = other.size and np.abs(self.boundaries - other).max() < 1e-8
        at = (self.boundaries + other) / 2 if near else self.boundaries
        return Steps(at, self.codes, self.levels)

    def codebook(self, bits: int, slopes: Derivative) -> Codebook:
        """As plain numbers; levels of 13 digits, so that rounding does not show in a slope of 1."""
        return Codebook(
            tuple(map(float, self.boundaries)),
            tuple(map(int, self.codes)),
            tuple(float(f"{level:.13g}") for level in self.levels),
            bits,
            self.error(slopes),
        )


def code_intervals(boundaries: np.ndarray, levels: np.ndarray, *, even: bool) -> Steps:
    """A code for each interval of x, or of ``|x|``."""
    codes = np.arange(levels.size)
    if not even:
        return Steps(boundaries, codes, levels)
    mirrored = np.concatenate([-boundaries[::-1], boundaries])
    return Steps(mirrored, np.concatenate([codes[:0:-1], codes]), levels)


def code_values(slopes: Derivative, thresholds: np.ndarray, levels: np.ndarray) -> Steps:
    """A code for each interval of ``f'``: the steps of x are where it crosses a threshold."""
    left, right = (np.searchsorted(thresholds, side) for side in slopes.ends)
    at, codes = [], [int(left[0])]
    for cell, (first, last) in enumerate(zip(left, right, strict=True)):
        if first != codes[-1]:
            at.append(slopes.edges[cell])
            codes.append(int(first))
        if first == last:
            continue
        way = 1 if last > first else -1
        after = np.arange(first + way, last + way, way)
        crossed = thresholds[np.minimum(after, after - way)]
        at.extend(slopes.solve(crossed, np.full(after.shape, cell)))
        codes.extend(map(int, after))
    return _without_slivers(Steps(np.array(at), np.array(codes), levels), slopes.edges[-1])


def _without_slivers(steps: Steps, domain: float) -> Steps:
    """Without the intervals that rounding makes where a threshold is crossed at an edge."""
    ends = np.concatenate([[-np.inf], steps.boundaries, [np.inf]])
    at: list[float] = []
    codes: list[int] = []
    for code, (start, stop) in zip(steps.codes, itertools.pairwise(ends), strict=True):
        if stop - start < 1e-11 * domain or (codes and codes[-1] == code):
            continue
        if codes:
            at.append(start)
        codes.append(int(code))
    return Steps(np.array(at), np.array(codes, np.int64), steps.levels)


def on_float32(
    book: Codebook, slopes: Derivative, slopes_at: Callable[[np.ndarray], np.ndarray]
) -> Codebook:
    """With boundaries at jumps of ``f'`` where the float32 numbers begin that belong above.

    Those near a jump go to the side that ``jax.grad`` puts them on, the jump itself above all.
    """
    at = list(book.boundaries)
    jumps = slopes.edges[slopes.jumps]
    for i, boundary in enumerate(at):
        if not jumps.size or np.abs(jumps - boundary).min() > 1e-12 * slopes.edges[-1]:
            continue
        near = _float32_near(boundary)
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
