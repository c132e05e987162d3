"""Step functions and tables of any size, evaluated elementwise in the fastest way.

Up to some dozens of intervals that is a sum of comparisons: it fuses with what makes ``x``, and a
TPU is slow in gathers. More boundaries are looked up by bins, at a cost that hardly grows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.quantization.maps import count_steps, select_levels

MOST_COMPARES = 48  # boundaries; at 5 bits codebooks have about 40
MOST_SELECTS = 32  # levels
MOST_BINS = 4096


def step_values(boundaries: tuple[float, ...], codes: tuple[int, ...], x: jax.Array) -> jax.Array:
    """uint8: ``codes[i]`` where i boundaries are below ``x``; ``codes[0]`` where that is NaN."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if len(boundaries) <= MOST_COMPARES:
        return count_steps(boundaries, codes, x).astype(jnp.uint8)
    low, per_unit, first, edges, growths = _bins(boundaries, codes, x.dtype.name)
    index = jnp.minimum((x - low) * per_unit, len(first) - 1)
    index = jnp.where(x > low, index, 0).astype(jnp.int32)
    code = _gathered(first, index)
    for edge, growth in zip(edges, growths, strict=True):
        code += jnp.where(x > _gathered(edge, index), _gathered(growth, index), jnp.uint8(0))
    return code


def table_values(levels: tuple[float, ...], codes: jax.Array) -> jax.Array:
    """float32: ``levels[codes]``."""
    codes = codes.astype(jnp.int32)
    if len(levels) <= MOST_SELECTS:
        return select_levels(levels, codes)
    return _gathered(np.asarray(levels, np.float32), codes)


def _gathered(table: np.ndarray, index: jax.Array) -> jax.Array:
    """``table[index]``, sharded as ``index`` is."""
    sharding = explicit_sharding.partition_of(index)
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds", out_sharding=sharding)


@functools.lru_cache(maxsize=256)
def _bins(boundaries: tuple[float, ...], codes: tuple[int, ...], dtype: str) -> tuple:
    """Equal parts of the boundaries' range, with one boundary in each if `MOST_BINS` suffice.

    The lowest boundary and the bins per unit; for each bin its first code, and rows of its
    boundaries and of what the code grows by at each (modulo 256).
    """
    edges = np.asarray(boundaries, dtype)
    code = np.asarray(codes, np.uint8)
    low, width = edges[0], edges[-1] - edges[0]
    gap = max(np.diff(edges).min(), width / MOST_BINS)
    count = min(2 ** int(np.ceil(np.log2(width / gap))), MOST_BINS)
    # In the arithmetic of `step_values`, which never puts a larger number into an earlier bin.
    per_unit = edges.dtype.type(count / width)
    index = np.minimum((edges - low) * per_unit, count - 1).astype(np.int32)
    before = np.searchsorted(index, np.arange(count))
    rank = np.arange(len(edges)) - before[index]
    shape = (rank.max() + 1, count)
    tables = np.full(shape, np.inf, edges.dtype), np.zeros(shape, np.uint8)
    tables[0][rank, index] = edges
    tables[1][rank, index] = code[1:] - code[:-1]
    return low, per_unit, code[before], *tables
