"""A step function and a table, evaluated elementwise: each in the way that is fastest.

Up to some dozens of intervals a sum of comparisons is: it fuses with what makes ``x``, needs no
gather, which a TPU does slowly, and costs about 0.05 ns for each boundary and element on a CPU.
Beyond, the boundaries are looked up by bins, at a cost that hardly grows with their number.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.matrices import explicit_sharding

MOST_COMPARES = 48  # boundaries; at 5 bits codebooks have about 40
MOST_SELECTS = 32  # levels
MOST_BINS = 4096


class _Bins(NamedTuple):
    """Equal parts of the range of the boundaries: for each the code that it begins with, and then
    its boundaries and what the code grows by at each (modulo 256), as far as any part has any."""

    low: np.floating
    per_unit: np.floating
    first: np.ndarray
    boundaries: np.ndarray
    growths: np.ndarray


def step_values(boundaries: tuple[float, ...], codes: tuple[int, ...], x: jax.Array) -> jax.Array:
    """uint8: ``codes[i]`` where i boundaries are below ``x``; ``codes[0]`` where that is NaN."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if len(boundaries) > MOST_COMPARES:
        return _looked_up(_bins(boundaries, codes, x.dtype.name), x)
    code = jnp.full(x.shape, codes[0], jnp.int32)
    for boundary, (below, above) in zip(boundaries, itertools.pairwise(codes), strict=True):
        code += jnp.where(x > boundary, above - below, 0)
    return code.astype(jnp.uint8)


def table_values(levels: tuple[float, ...], codes: jax.Array) -> jax.Array:
    """float32: ``levels[codes]``."""
    codes = codes.astype(jnp.int32)
    if len(levels) > MOST_SELECTS:
        return _gathered(jnp.asarray(levels, jnp.float32), codes)
    values = [jnp.float32(level) for level in levels]
    bit = 1
    while len(values) > 1:  # a binary tree: the lowest bit says which of each two
        odd = (codes & bit) != 0
        pairs = itertools.zip_longest(values[::2], values[1::2])
        values = [low if high is None else jnp.where(odd, high, low) for low, high in pairs]
        bit *= 2
    return jnp.broadcast_to(values[0], codes.shape)


def _looked_up(bins: _Bins, x: jax.Array) -> jax.Array:
    last = len(bins.first) - 1
    place = jnp.minimum((x - bins.low) * bins.per_unit, last)
    place = jnp.where(x > bins.low, place, 0).astype(jnp.int32)
    of_bin = lambda table: _gathered(jnp.asarray(table), place)
    code = of_bin(bins.first)
    for boundaries, growths in zip(bins.boundaries, bins.growths, strict=True):
        code += jnp.where(x > of_bin(boundaries), of_bin(growths), jnp.uint8(0))
    return code


def _gathered(table: jax.Array, place: jax.Array) -> jax.Array:
    """``table[place]``, sharded as ``place`` is."""
    sharding = explicit_sharding.partition_of(place)
    return table.at[place].get(mode="promise_in_bounds", out_sharding=sharding)


@functools.lru_cache(maxsize=256)
def _bins(boundaries: tuple[float, ...], codes: tuple[int, ...], dtype: str) -> _Bins:
    """As many bins as leave one boundary to each, if that takes no more than `MOST_BINS`."""
    edges = np.asarray(boundaries, dtype)
    code = np.asarray(codes, np.uint8)
    low, width = edges[0], edges[-1] - edges[0]
    gap = max(np.diff(edges).min(), width / MOST_BINS)
    count = min(2 ** int(np.ceil(np.log2(width / gap))), MOST_BINS)
    # In the arithmetic of `_looked_up`, which never puts a larger number into an earlier bin.
    per_unit = edges.dtype.type(count / width)
    place = np.minimum((edges - low) * per_unit, count - 1).astype(np.int32)
    before = np.searchsorted(place, np.arange(count))
    rank = np.arange(len(edges)) - before[place]
    shape = (rank.max() + 1, count)
    tables = np.full(shape, np.inf, edges.dtype), np.zeros(shape, np.uint8)
    tables[0][rank, place] = edges
    tables[1][rank, place] = code[1:] - code[:-1]
    return _Bins(low, per_unit, code[before], *tables)
