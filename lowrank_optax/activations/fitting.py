"""The best steps for a derivative: the parts of a fit, put together."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np

from lowrank_optax.activations.density import as_density
from lowrank_optax.activations.derivative import Derivative, derivative, gradient
from lowrank_optax.activations.fit_arguments import Coding
from lowrank_optax.activations.lines import IntervalLine, ValueLine
from lowrank_optax.activations.segmentation import means, split
from lowrank_optax.activations.step_function import Codebook
from lowrank_optax.activations.steps import Steps, code_intervals, code_values, on_float32

GRID = 2048


def fit(
    fn: Callable[[jax.Array], jax.Array], bits: int, density: Any, domain: float, coding: Coding
) -> Codebook:
    """See `codebook`; always fitted anew."""
    if not callable(fn):
        raise TypeError(f"fn={fn!r} must take a number to a number.")
    slopes_at = gradient(fn)
    slopes = derivative(slopes_at, domain, as_density(density, domain))
    book = fit_steps(slopes, bits, coding).codebook(bits, slopes)
    return on_float32(book, slopes, slopes_at)


@functools.lru_cache(maxsize=256)
def fit_once(
    fn: Callable[[jax.Array], jax.Array], bits: int, density: str, domain: float, coding: Coding
) -> Codebook:
    """`fit`, remembered."""
    return fit(fn, bits, density, domain, coding)


def fit_steps(slopes: Derivative, bits: int, coding: Coding, *, parity: bool = True) -> Steps:
    """The best steps for a derivative.

    Args:
      slopes: The derivative.
      bits: 1 to 8.
      coding: What a code says.
      parity: Whether ``coding="interval"`` may code ``|x|`` where the derivative is even.
    """
    if coding == "value":
        line = ValueLine(slopes, GRID)
        thresholds = split(line, 2**bits)
        steps = code_values(slopes, thresholds, means(line, thresholds))
    else:
        even = parity and _is_even(slopes)
        line = IntervalLine(slopes, GRID, even)
        boundaries = split(line, 2**bits)
        steps = code_intervals(boundaries, means(line, boundaries), even=even)
    return steps.mirrored()


def _is_even(slopes: Derivative) -> bool:
    x = (slopes.edges[:-1] + slopes.edges[1:]) / 2
    right, left = slopes.value(x), slopes.value(-x)
    return bool(np.abs(left - right).max() < 1e-6 * max(1.0, np.abs(right).max()))
