"""How often a nonlinearity is asked at which x: what a codebook's error is weighted with."""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, TypeAlias

import numpy as np

DensityName: TypeAlias = Literal["uniform", "normal"]


@dataclasses.dataclass(frozen=True)
class Density:
    """A weight for each x.

    Attributes:
      at: The density of an array, float64.
      breaks: Where it jumps, increasing.
    """

    at: Callable[[np.ndarray], np.ndarray]
    breaks: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))


def as_density(density: Any, domain: float) -> Density:
    """The density of a name or of samples.

    Raises:
      ValueError: If the name is unknown; the samples are none, not finite, or all off the domain.
    """
    if isinstance(density, str):
        if density == "uniform":
            return Density(np.ones_like)
        if density == "normal":
            return Density(lambda x: np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi))
        raise ValueError(
            f"density={density!r} must be 'uniform', 'normal' or an array of measured inputs."
        )
    return _histogram(np.asarray(density, np.float64).ravel(), domain)


def _histogram(samples: np.ndarray, domain: float) -> Density:
    """Bins of equal width and of equal share alike: fine where there is much to tell."""
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
    shares = np.quantile(inside, np.linspace(0, 1, 257))
    repeated = shares[1:][np.diff(shares) == 0]  # as the zeros behind a relu: a bin of its own
    parts = [np.linspace(-domain, domain, 321), shares, repeated + 1e-4 * domain]
    edges = np.unique(np.clip(np.concatenate(parts), -domain, domain))
    edges = edges[np.append(np.diff(edges) > 1e-6 * domain, True)]
    edges[0] = -domain
    counts, _ = np.histogram(inside, edges)
    height = counts / (inside.size * np.diff(edges))
    bins = lambda x: np.clip(np.searchsorted(edges, x, "right") - 1, 0, counts.size - 1)
    return Density(lambda x: height[bins(x)], edges)
