"""The derivative of a function of one number in float64, as polynomials on cells.

Fitting a codebook asks for the derivative, its roots and its integrals some 100 000 times. So it is
evaluated once, on cells that are bisected until polynomials of degree 7 say it to 11 digits; a jump
ends up between two cells. All else is NumPy.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import numpy as np
from numpy.polynomial import legendre

from lowrank_optax.activations.density import Density
from lowrank_optax.activations.outside_traces import outside_of_traces

ORDER = 8
_NODES, _WEIGHTS = legendre.leggauss(ORDER)
# Values at the nodes -> Legendre coefficients.
_TO_COEFFICIENTS = np.array(
    [(n + 0.5) * _WEIGHTS * legendre.legval(_NODES, np.eye(ORDER)[n]) for n in range(ORDER)]
)
# The second is for a function that rounds to float32 on its way: more cells than these are noise.
_TOLERANCES = (1e-11, 1e-5)
_MOST_CELLS = 4000


def gradient(fn: Callable[[Any], Any]) -> Callable[..., np.ndarray]:
    """``jax.grad(fn)`` for NumPy arrays of any shape, in their dtype; also while tracing."""
    compiled = jax.jit(jax.vmap(jax.grad(fn)))

    def work(x: np.ndarray) -> np.ndarray:
        with jax.enable_x64(x.dtype == np.float64):
            _require_scalar(fn, x.dtype)
            # Padded to a power of two, so that few shapes are compiled.
            padded = np.full(max(1 << (x.size - 1).bit_length(), 1024), x.flat[0], x.dtype)
            padded[: x.size] = x.ravel()
            return np.asarray(compiled(padded))[: x.size].reshape(x.shape)

    return lambda x: outside_of_traces(lambda: work(x))


def _require_scalar(fn: Callable[[Any], Any], dtype: Any) -> None:
    try:
        out = jax.eval_shape(fn, jax.ShapeDtypeStruct((), dtype))
    except Exception as error:
        raise TypeError(f"fn={fn!r} must take a number to a number; it raised: {error}") from error
    if not isinstance(out, jax.ShapeDtypeStruct) or out.shape or out.dtype.kind != "f":
        raise TypeError(f"fn={fn!r} must take a number to a real number, not to {out}.")


@dataclasses.dataclass(frozen=True)
class Derivative:
    """``f'`` and a density on cells, in each of which ``f'`` is smooth and monotone.

    Attributes:
      edges: Ends of the cells, increasing, [cells + 1].
      slope: Legendre coefficients of ``f'``, [8, cells].
      moments: Those of the integrals of the density times 1, ``f'``, ``f'**2`` from the left end of
        a cell, [3, 9, cells].
      before: These integrals up to each edge, [3, cells + 1].
      ends: ``f'`` at the left and right end of each cell, from inside, [2, cells].
      jumps: Edges at which ``f'`` jumps, by their number in ``edges``.
    """

    edges: np.ndarray
    slope: np.ndarray
    moments: np.ndarray
    before: np.ndarray
    ends: np.ndarray
    jumps: np.ndarray

    def cell(self, x: np.ndarray) -> np.ndarray:
        """The cell of each x; an edge's is the one on its right."""
        return np.clip(np.searchsorted(self.edges, x, "right") - 1, 0, self.edges.size - 2)

    def local(self, x: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """Where x lies in its cell, from -1 to 1."""
        left, right = self.edges[cell], self.edges[cell + 1]
        return np.clip((2 * x - left - right) / (right - left), -1, 1)

    def value(self, x: np.ndarray, cell: np.ndarray | None = None) -> np.ndarray:
        """``f'`` at x."""
        cell = self.cell(x) if cell is None else cell
        return legendre.legval(self.local(x, cell), self.slope[:, cell], tensor=False)

    def integrals(self, x: np.ndarray, cell: np.ndarray | None = None) -> np.ndarray:
        """Those of the density times 1, ``f'``, ``f'**2`` up to x, [3, ...]."""
        cell = self.cell(x) if cell is None else cell
        u = self.local(x, cell)
        parts = [legendre.legval(u, m[:, cell], tensor=False) for m in self.moments]
        return self.before[:, cell] + np.stack(parts)

    def solve(self, value: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """Where ``f'`` takes a value that it takes in that cell: bisection."""
        low, high = self.edges[cell], self.edges[cell + 1]
        rising = self.ends[1, cell] > self.ends[0, cell]
        for _ in range(60):
            middle = (low + high) / 2
            left = (self.value(middle, cell) < value) == rising
            low, high = np.where(left, middle, low), np.where(left, high, middle)
        return (low + high) / 2


def derivative(slopes: Callable[..., np.ndarray], domain: float, density: Density) -> Derivative:
    """``f'``, of which `gradient` gives the values, on [-domain, domain], in cells.

    Raises:
      ValueError: If ``f'`` is not finite somewhere.
    """
    half = np.linspace(0, domain, 321)
    edges = _distinct(np.concatenate([-half[:0:-1], half, density.breaks]), 1e-7 * domain)
    refined, tolerance = edges, _TOLERANCES[-1]
    for tolerance in _TOLERANCES:
        refined = _refined(slopes, edges, density, tolerance)
        if refined.size < _MOST_CELLS:
            break
    edges = _split_extrema(slopes, _without_slivers(refined, domain), 10 * tolerance)
    width = np.diff(edges)
    x = _points(edges)
    v, w = _finite(slopes, x), density.at(x)
    slope = _TO_COEFFICIENTS @ v.T
    integrands = np.stack([_TO_COEFFICIENTS @ (w * v**power).T for power in range(3)])
    moments = legendre.legint(integrands, axis=1, lbnd=-1) * width / 2
    before = np.zeros((3, edges.size))
    before[:, 1:] = np.cumsum(integrands[:, 0] * width, axis=1)
    ends = np.stack([legendre.legval(side, slope) for side in (-1.0, 1.0)])
    jump = np.abs(ends[0, 1:] - ends[1, :-1]) > 1e3 * tolerance * max(1.0, np.abs(ends).max())
    return Derivative(edges, slope, moments, before, ends, 1 + np.flatnonzero(jump))


def _points(edges: np.ndarray) -> np.ndarray:
    """The nodes of each cell, [cells, 8]."""
    return (edges[:-1, None] + edges[1:, None] + np.diff(edges)[:, None] * _NODES) / 2


def _distinct(edges: np.ndarray, apart: float) -> np.ndarray:
    edges = np.unique(edges)
    return edges[np.append(np.diff(edges) > apart, True)]


def _finite(slopes: Callable[..., np.ndarray], x: np.ndarray) -> np.ndarray:
    values = slopes(x)
    if not np.isfinite(values).all():
        where = x[~np.isfinite(values)]
        first = where[np.abs(where).argmin()]
        raise ValueError(
            f"The derivative of fn is not finite at x = {first:.6g}: fit on another domain."
        )
    return values


def _refined(
    slopes: Callable[..., np.ndarray], edges: np.ndarray, density: Density, tolerance: float
) -> np.ndarray:
    """Edges of cells whose polynomials, of ``f'`` and of the density, hold between the nodes."""
    open_left, open_right = edges[:-1], edges[1:]
    done: list[np.ndarray] = [edges]
    narrowest = 1e-14 * edges[-1]
    for _ in range(60):
        middle = (open_left + open_right) / 2
        inside = _NODES / 2
        u = np.concatenate([inside - 0.5, inside + 0.5])
        width = (open_right - open_left)[:, None]
        coarse, fine = (middle[:, None] + width * at / 2 for at in (_NODES, u))
        points = np.concatenate([coarse, fine], axis=1)
        bad = np.zeros(middle.shape, bool)
        for values in (_finite(slopes, points), density.at(points)):
            guess = legendre.legval(u, _TO_COEFFICIENTS @ values[:, :ORDER].T)
            scale = max(1.0, np.abs(values).max())
            bad |= np.abs(guess - values[:, ORDER:]).max(axis=1) > tolerance * scale
        bad &= width[:, 0] > narrowest
        done.append(middle[bad])
        if not bad.any() or sum(map(len, done)) > _MOST_CELLS:
            break
        left, right, middle = open_left[bad], open_right[bad], middle[bad]
        open_left = np.concatenate([left, middle])
        open_right = np.concatenate([middle, right])
    return np.unique(np.concatenate(done))


def _without_slivers(edges: np.ndarray, domain: float) -> np.ndarray:
    """Without the cells that were bisected to nothing around a jump: an edge is left of them."""
    sliver = np.diff(edges) < 1e-9 * domain
    starts = np.flatnonzero(sliver & ~np.concatenate([[False], sliver[:-1]]))
    keep = np.ones(edges.shape, bool)
    keep[1:] &= ~sliver
    keep[:-1] &= ~sliver
    kept = [edges[keep]]
    for start in starts:
        stop = start + int(np.argmin(np.append(sliver[start:], False)))
        narrowest = start + int(np.diff(edges[start : stop + 1]).argmin())
        kept.append(edges[narrowest : narrowest + 1])
    return np.unique(np.concatenate([*kept, edges[[0, -1]]]))


def _split_extrema(
    slopes: Callable[..., np.ndarray], edges: np.ndarray, tolerance: float
) -> np.ndarray:
    """With an edge where ``f'`` has an extremum inside a cell."""
    values = _finite(slopes, _points(edges))
    steps = np.diff(values, axis=1)
    scale = tolerance * max(1.0, np.abs(values).max())
    turns = (steps.max(axis=1) > scale) & (steps.min(axis=1) < -scale)
    slope = _TO_COEFFICIENTS @ values.T
    found = [edges]
    for cell in np.flatnonzero(turns):
        roots = legendre.legroots(legendre.legder(slope[:, cell]))
        roots = roots[np.isreal(roots)].real
        roots = roots[np.abs(roots) < 1 - 1e-6]
        found.append((edges[cell] + edges[cell + 1] + np.diff(edges)[cell] * roots) / 2)
    return np.unique(np.concatenate(found))
