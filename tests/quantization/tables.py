"""The numbers of each code map in float64, from their definitions and not from closed forms."""

import itertools
import statistics
from typing import Any

import numpy as np

from lowrank_optax.quantization.maps import NORMAL_LEVELS

# Maps of 8 and 4 bits: name, bits, signed.
MAPS = [
    *itertools.product(["dynamic"], [8, 4], [True, False]),
    ("linear", 8, True),
    ("linear", 4, True),
    ("nf4", 4, True),
]


def table(name: str, bits: int, signed: bool) -> np.ndarray:
    """The numbers in ascending order, so that an index is a code."""
    make = {"dynamic": _dynamic, "linear": _linear, "nf4": _nf4, "normal": _normal}[name]
    return make(bits, signed)


def _dynamic(bits: int, signed: bool) -> np.ndarray:
    """Middles of even bins in every decade (Dettmers et al., 2021), and zero and one."""
    exponents = bits - 1
    values = [0.0, 1.0]
    for i in range(exponents):
        edges = np.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - exponents + 1)
        values += [*middles, *(-middles if signed else [])]
    return np.sort(values)


def _linear(bits: int, signed: bool) -> np.ndarray:
    return np.linspace(-1, 1, 2**bits - 1)


def _nf4(bits: int, signed: bool) -> np.ndarray:
    """Normal quantiles of eight and nine even probabilities from 1/2 to 0.9677, over the largest.

    The 0.9677 is the mean of 1 - 1/32 and 1 - 1/30, to seven digits in the official code.
    """
    normal = statistics.NormalDist().inv_cdf
    positive = [normal(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    negative = [-normal(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    return np.sort([*negative, 0.0, *positive]) / max(positive)


def _normal(bits: int, signed: bool) -> np.ndarray:
    """Fitted levels: that they are the best ones is tested with gated nonlinearities."""
    return np.sort([sign * level for sign in (-1, 1) for level in NORMAL_LEVELS[bits]])


def half_gap(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Half the distance of the two numbers of a map around each ``x``."""
    gaps = np.diff(values)
    return gaps[np.clip(np.searchsorted(values, x, side="right") - 1, 0, len(gaps) - 1)] / 2


def assert_same_codes(found: Any, wanted: Any, bits: int) -> None:
    """Of the codes one in two hundred may be that of a neighbour: rounding decides ties."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    found, wanted = (np.asarray(x, np.int32) for x in (found, wanted))
    split = lambda x: x if bits == 8 else np.stack([x & 15, x >> 4])
    apart = np.abs(split(found) - split(wanted))
    assert apart.max(initial=0) <= 1
    assert np.mean(apart != 0) <= 0.005
