"""Block-wise quantization: codes, and one scale for each block of consecutive elements.

Blocks lie along the last axis, so that an outlier spoils few neighbours, a scale is found without
crossing devices where leading axes are sharded, and codes have the shape, hence the sharding, of
what they stand for.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.draws import drawn, split
from lowrank_optax.quantization.maps import CodeMap
from lowrank_optax.quantization.packing import pack, packing_of, unpack


class Quantized(NamedTuple):
    """An array in codes.

    Attributes:
      codes: uint8, in the shape of the array; of 4 bits two to a byte, as `pack` has them.
      scales: float32, ``[*leading, blocks]``: the largest size of a block's finite elements.
    """

    codes: Any
    scales: Any


class BlockFormat(NamedTuple):
    """How arrays are put in codes: static.

    Attributes:
      map: The code map.
      block_size: Elements to a block: blocks start anew with each row of the last axis. Where that
        is shorter than a block, rows follow each other in one, as many as fit.
      positive: Whether zero is never stored where a block has anything else: what is smaller than
        the smallest positive number is stored as that. For denominators.
    """

    map: CodeMap
    block_size: int
    positive: bool = False


class Layout(NamedTuple):
    """Where the blocks of an array lie: ``[*leading, width]`` cut into blocks along ``width``.

    Attributes:
      leading: The axes before.
      merged: Number of last axes that make up the width: 1 unless they are shorter than a block.
      width: Their size.
      block: Elements to a block; the last of a row may have fewer.
      blocks: Blocks to a row.
    """

    leading: tuple[int, ...]
    merged: int
    width: int
    block: int
    blocks: int


def layout_of(shape: tuple[int, ...], block_size: int) -> Layout:
    """Where blocks lie in an array of this shape.

    Example:
      >>> from lowrank_optax.quantization.blocks import layout_of
      >>> layout_of((24, 2048, 5461), 256)
      Layout(leading=(24, 2048), merged=1, width=5461, block=256, blocks=22)
      >>> layout_of((4096, 8), 256)  # one block holds 32 rows
      Layout(leading=(), merged=2, width=32768, block=256, blocks=128)
    """
    merged = 1
    while merged < len(shape) and 0 < math.prod(shape[-merged:]) < block_size:
        merged += 1
    width = math.prod(shape[-merged:])
    block = max(1, min(block_size, width))
    return Layout(shape[: len(shape) - merged], merged, width, block, -(-width // block))


def same_layout(shape: tuple[int, ...], part: tuple[int, ...], fmt: BlockFormat) -> bool:
    """Whether slices of an array along its first axis, of this shape, are blocks of their own.

    If so, codes and scales of a slice are slices of those of the array.

    Example:
      >>> from lowrank_optax.quantization import BlockFormat, code_map
      >>> from lowrank_optax.quantization.blocks import same_layout
      >>> fmt = BlockFormat(code_map("dynamic", 8), block_size=256)
      >>> same_layout((4096, 8), (32, 8), fmt), same_layout((4096, 8), (16, 8), fmt)
      (True, False)
    """
    whole, own = layout_of(shape, fmt.block_size), layout_of(part, fmt.block_size)
    if whole.merged != own.merged or whole.block != own.block:
        return False
    if whole.merged == len(shape) and own.width % own.block:
        return False
    if fmt.map.bits != 4:
        return True
    packing, of_part = packing_of(shape), packing_of(part)
    aligned = (packing.axis > 0) or not of_part.padding
    return aligned and packing.axis == of_part.axis and packing.apart == of_part.apart


@functools.partial(jax.jit, static_argnames="fmt")  # one program, also where `init` runs eagerly
def quantize(
    x: jax.Array,
    fmt: BlockFormat,
    key: jax.Array | None = None,
    last_scales: jax.Array | None = None,
) -> Quantized:
    """Codes and scales of a float array ``[..., n]``.

    Elements that are not finite are stored as zero, and do not touch their block. Blocks whose
    largest element is below the least normal float32 are zero.

    Args:
      x: Any float array of at least one axis.
      fmt: How.
      key: If given, a key or one for each row, an element between two numbers of the map becomes
        either at random, so that its expectation is kept; otherwise the nearer one.
      last_scales: The scales ``x`` had before it was decoded, and perhaps changed: what nobody
        changed then keeps its codes and scales. (Else the scale of a block whose largest element is
        negative would shrink each time, where a map has one, but not minus one.)

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from lowrank_optax.quantization import BlockFormat, code_map, dequantize, quantize
      >>> fmt = BlockFormat(code_map("dynamic", 8), block_size=4)
      >>> x = jnp.array([0.5, -0.25, 0.0, 2.0, 0.1, jnp.nan])
      >>> q = quantize(x, fmt)
      >>> print(q.codes.dtype, q.scales.shape)
      uint8 (2,)
      >>> print(np.asarray(dequantize(q, fmt, x.shape)).round(3))
      [ 0.495 -0.242  0.     2.     0.1    0.   ]
    """
    keys = itertools.repeat(None) if key is None else iter(split(key))

    # What a negative element of a block's scale is decoded to, over the scale.
    least = jnp.abs(fmt.map.decode(jnp.zeros((), jnp.int32)))

    def encode(blocks: jax.Array, *last: jax.Array) -> tuple[jax.Array, jax.Array]:
        blocks = jnp.where(jnp.isfinite(blocks), blocks, 0)
        scales = jnp.max(jnp.abs(blocks), axis=-1)
        for old in last:
            scales = jnp.where((scales > 0) & (scales == least * old), old, scales)
        codes = encode_blocks(blocks, scales[..., None], fmt, next(keys))
        return codes.astype(jnp.uint8), scales

    of_blocks = (last_scales,) if fmt.map.signed and last_scales is not None else ()
    codes, scales = over_blocks(encode, x.shape, fmt.block_size, [x.astype(jnp.float32)], of_blocks)
    if fmt.map.bits == 8:
        codes = explicit_sharding.constrain(codes, explicit_sharding.partition_of(x))
    return Quantized(*pack(codes, fmt.map.bits, "rows"), scales)


@functools.partial(jax.jit, static_argnames=("fmt", "shape"))
def dequantize(quantized: Quantized, fmt: BlockFormat, shape: tuple[int, ...]) -> jax.Array:
    """The float32 array of this shape that codes and scales stand for."""

    def decode(codes: jax.Array, scales: jax.Array) -> tuple[jax.Array]:
        return (decode_blocks(codes.astype(jnp.int32), scales[..., None], fmt),)

    codes = unpack((quantized.codes,), shape, fmt.map.bits, "rows")
    return over_blocks(decode, shape, fmt.block_size, [codes], [quantized.scales])[0]


def encode_blocks(
    blocks: jax.Array, scales: jax.Array, fmt: BlockFormat, key: jax.Array | None = None
) -> jax.Array:
    """int32 codes of finite float32 ``blocks``, for scales that broadcast against them."""
    usable = scales >= jnp.finfo(jnp.float32).tiny
    x = jnp.where(usable, blocks, 0) / jnp.where(usable, scales, 1)
    codes = fmt.map.encode(x)
    if key is not None:
        codes = _at_random(x, codes, fmt.map, key)
    return jnp.maximum(codes, fmt.map.least_positive) if fmt.positive else codes


def decode_blocks(codes: jax.Array, scales: jax.Array, fmt: BlockFormat) -> jax.Array:
    """The float32 numbers of int32 codes, for scales that broadcast against them."""
    return fmt.map.decode(codes) * scales


def _at_random(x: jax.Array, codes: jax.Array, map: CodeMap, key: jax.Array) -> jax.Array:
    """The codes, or those of the neighbours across ``x``, with ``x`` as their expectation."""
    nearest = map.decode(codes)
    away = jnp.where(x > nearest, 1, -1)
    # Codes of fp8 count sizes, from zero on for each sign.
    step = jnp.where(x < 0, -away, away) if map.name == "fp8" else away
    other = jnp.clip(codes + step, 0, 255 if map.name == "fp8" else map.largest)
    gap = map.decode(other) - nearest
    between = (x != nearest) & (gap * away > 0)
    chance = jnp.where(between, (x - nearest) / jnp.where(between, gap, 1), 0)
    taken = drawn(jax.random.uniform, key, x.shape) < chance
    return jnp.where(taken, other, codes)


def over_blocks(
    function: Callable[..., tuple[jax.Array, ...]],
    shape: tuple[int, ...],
    block_size: int,
    elements: Sequence[jax.Array],
    of_blocks: Sequence[jax.Array] = (),
) -> tuple[jax.Array, ...]:
    """Applies a function to the blocks of arrays.

    It is called once for the whole blocks and once for the short ones at the ends of rows, if there
    are any: to pad these instead would cost a CPU ten times the time.

    Args:
      function: From blocks ``[*leading, b, block]`` of each array, and arrays ``[*leading, b]``, to
        a tuple of such arrays.
      shape: Of the arrays; see `layout_of`.
      block_size: Elements to a block.
      elements: Arrays in this shape.
      of_blocks: Arrays ``[*leading, blocks]``.

    Returns:
      For each array of the function's result one in ``shape``, or ``[*leading, blocks]``.
    """
    layout = layout_of(shape, block_size)
    axis, block = len(layout.leading), layout.block
    if layout.merged > 1:
        merge = explicit_sharding.merge_axes
        elements = [merge(x, axis, layout.merged) for x in elements]
    elements = [explicit_sharding.in_whole_runs(x, axis, block) for x in elements]
    whole = layout.width // block
    parts = [(0, whole, block), (whole, layout.blocks, layout.width % block)]
    results = []
    for first, last, size in parts:
        if first < last or (layout.blocks == 0 and size == block):
            ends = first * block, first * block + (last - first) * size
            split = explicit_sharding.split_axis
            blocks = (split(_cut(x, *ends, axis), axis, (size,)) for x in elements)
            results.append(function(*blocks, *(_cut(x, first, last, axis) for x in of_blocks)))
    return tuple(_joined(column, layout, shape) for column in zip(*results, strict=True))


def _cut(x: jax.Array, start: int, stop: int, axis: int) -> jax.Array:
    whole = stop - start == x.shape[axis]
    return x if whole else jax.lax.slice_in_dim(x, start, stop, axis=axis)


def _joined(parts: Sequence[jax.Array], layout: Layout, shape: tuple[int, ...]) -> jax.Array:
    axis = len(layout.leading)
    if parts[0].ndim == axis + 1:
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)
    rows = [explicit_sharding.merge_axes(x, axis, 2) for x in parts]
    x = rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=axis)
    return explicit_sharding.split_axis(x, axis, shape[axis + 1 :]) if layout.merged > 1 else x
