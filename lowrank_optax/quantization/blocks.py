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
from lowrank_optax.quantization.packing import PackingName, pack, packing_of, unpack


class Quantized(NamedTuple):
    """An array in codes.

    Attributes:
      codes: uint8 in the shape of the array, with 4 bits one axis halved; see `packing_of`. With
        another packing than ``"rows"`` the tuple that `pack` returns.
      scales: ``[*leading, blocks]``: the largest size of a block's finite elements.
    """

    codes: Any
    scales: Any


class Affine(NamedTuple):
    """An array in codes of the ``"affine"`` map, which stand for ``scales · (codes - zeros)``.

    Attributes:
      codes: As those of `Quantized`.
      scales: float32 ``[*leading, blocks]``.
      zeros: uint8 ``[*leading, blocks]``, the code of zero.
    """

    codes: Any
    scales: Any
    zeros: Any


class BlockFormat(NamedTuple):
    """How arrays are put in codes: static.

    Attributes:
      map: The code map: a table or a formula.
      block_size: Elements to a block. Blocks start again with each row of the last axis. Where that
        is shorter than a block, rows follow each other in one, as many as fit.
      positive: Whether zero is never stored where a block has anything else: what is smaller than
        the smallest positive number is stored as that. For denominators.
      scale_dtype: Dtype of the scales. Codes are made with rounded scales, so that their rounding
        loses nothing. An ``"affine"`` map takes float32 alone, and no ``positive``.
      packing: How codes share bytes; see `pack`.
    """

    map: CodeMap
    block_size: int
    positive: bool = False
    scale_dtype: Any = jnp.float32
    packing: PackingName = "rows"


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
    """Whether codes and scales of slices ``part`` along the first axis are slices of the array's.

    With blocks of 256, rows of 8 may be cut in runs of 32, but not of 16.
    """
    whole, own = layout_of(shape, fmt.block_size), layout_of(part, fmt.block_size)
    if whole.merged != own.merged or whole.block != own.block:
        return False
    if whole.merged == len(shape) and own.width % own.block:
        return False
    if fmt.packing != "rows":
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
) -> Any:
    r"""Codes and scales of a float array: `Quantized`, or `Affine` for an ``"affine"`` map.

    Elements that are not finite are stored as zero, and do not touch their block. Blocks whose
    largest element is below the least normal float32 are zero.

    An ``"affine"`` map is spread between the extremes of each block, zero among them:
    :math:`s = (\max - \min) / (2^b - 1)`, :math:`z = -\mathrm{round}(\min / s)`,
    :math:`c = \mathrm{round}(x / s) + z`, decoded as :math:`s (c - z)`
    (`Zhang et al., 2024 <https://arxiv.org/abs/2407.08296>`_, section 3.2). With a key there is
    one step less, and :math:`z` is rounded up: clipped, the extremes would be biased towards zero.

    Args:
      x: Float array of any shape.
      fmt: Map, block size and packing.
      key: A key, or one for each row, to round an element between two numbers of the map up or down
        at random, with the element as expectation; None for the nearer one.
      last_scales: The scales ``x`` had before it was decoded, and perhaps changed: what nobody
        changed then keeps its codes and scales. (Else the scale of a block whose largest element is
        negative would shrink each time, where a map has one, but not minus one.)

    Raises:
      ValueError: If an ``"affine"`` map is given ``positive``, ``last_scales`` or a ``scale_dtype``
        other than float32.

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
    if fmt.map.has_zero_point and (
        fmt.positive or jnp.dtype(fmt.scale_dtype) != jnp.float32 or last_scales is not None
    ):
        raise ValueError(
            "an affine map takes neither positive, nor a scale_dtype but float32, nor last_scales."
        )
    keys = itertools.repeat(None) if key is None else iter(split(key))
    top = fmt.map.largest

    def encode(blocks: jax.Array, *last: jax.Array) -> tuple[jax.Array, ...]:
        blocks = jnp.where(jnp.isfinite(blocks), blocks, 0)
        if fmt.map.has_zero_point:
            steps = top if key is None else top - 1
            low = jnp.minimum(jnp.min(blocks, axis=-1), 0)
            scales = jnp.maximum(jnp.max(blocks, axis=-1), 0) / steps - low / steps
            usable = scales >= jnp.finfo(jnp.float32).tiny
            lowest = jnp.where(usable, low, 0) / jnp.where(usable, scales, 1)
            zeros = -(jnp.round(lowest) if key is None else jnp.floor(lowest))
            zeros = jnp.clip(zeros, 0, top)
            codes = encode_blocks(blocks, scales[..., None], fmt, next(keys), zeros[..., None])
            return codes.astype(jnp.uint8), scales, zeros.astype(jnp.uint8)
        sizes = jnp.max(jnp.abs(blocks), axis=-1)
        scales = sizes.astype(fmt.scale_dtype)
        for old in last:
            # What a negative element of the block's scale is decoded to, over the scale.
            least = jnp.abs(fmt.map.decode(jnp.zeros((), jnp.int32)))
            scales = jnp.where((sizes > 0) & (sizes == least * old), old, scales)
        codes = encode_blocks(blocks, scales.astype(jnp.float32)[..., None], fmt, next(keys))
        return codes.astype(jnp.uint8), scales

    shape = x.shape or (1,)
    of_blocks = (last_scales,) if fmt.map.signed and last_scales is not None else ()
    elements = [x.astype(jnp.float32).reshape(shape)]
    codes, *of_blocks = over_blocks(encode, shape, fmt.block_size, elements, of_blocks)
    codes = codes.reshape(x.shape)
    if fmt.map.bits == 8:
        codes = explicit_sharding.constrain(codes, explicit_sharding.partition_of(x))
    packed = pack(codes, fmt.map.bits, fmt.packing)
    result = Affine if fmt.map.has_zero_point else Quantized
    return result(packed[0] if fmt.packing == "rows" else packed, *of_blocks)


@functools.partial(jax.jit, static_argnames=("fmt", "shape"))
def dequantize(
    quantized: Quantized | Affine, fmt: BlockFormat, shape: tuple[int, ...]
) -> jax.Array:
    """The float32 array of this shape that codes and scales stand for."""

    def decode(codes: jax.Array, scales: jax.Array, *zeros: jax.Array) -> tuple[jax.Array]:
        scales = scales.astype(jnp.float32)[..., None]
        codes = codes.astype(jnp.int32)
        for zero in zeros:
            codes -= zero[..., None].astype(jnp.int32)
        return (decode_blocks(codes, scales, fmt),)

    codes, *of_blocks = quantized
    packed = (codes,) if fmt.packing == "rows" else codes
    codes = unpack(packed, shape, fmt.map.bits, fmt.packing).reshape(shape or (1,))
    return over_blocks(decode, codes.shape, fmt.block_size, [codes], of_blocks)[0].reshape(shape)


def encode_blocks(
    blocks: jax.Array,
    scales: jax.Array,
    fmt: BlockFormat,
    key: jax.Array | None = None,
    zeros: jax.Array | None = None,
) -> jax.Array:
    """int32 codes of finite float32 ``blocks``, for scales that broadcast against them."""
    usable = scales >= jnp.finfo(jnp.float32).tiny
    x = jnp.where(usable, blocks, 0) / jnp.where(usable, scales, 1)
    if zeros is not None:
        if key is None:
            whole = fmt.map.encode(x)
        else:
            whole = jnp.floor(x + drawn(jax.random.uniform, key, x.shape))
        return jnp.clip(whole + zeros, 0, fmt.map.largest).astype(jnp.int32)
    codes = fmt.map.encode(x)
    if key is not None:
        # One of the two numbers around x, with x as expectation.
        nearest = fmt.map.decode(codes)
        away = jnp.where(x > nearest, 1, -1)
        other = jnp.clip(codes + away, 0, fmt.map.largest)
        gap = fmt.map.decode(other) - nearest
        between = (x != nearest) & (gap * away > 0)
        chance = jnp.where(between, (x - nearest) / jnp.where(between, gap, 1), 0)
        codes = jnp.where(drawn(jax.random.uniform, key, x.shape) < chance, other, codes)
    return jnp.maximum(codes, fmt.map.least_positive) if fmt.positive else codes


def decode_blocks(codes: jax.Array, scales: jax.Array, fmt: BlockFormat) -> jax.Array:
    """The float32 numbers of int32 codes, for scales that broadcast against them."""
    return fmt.map.decode(codes) * scales


def over_blocks(
    function: Callable[..., tuple[jax.Array, ...]],
    shape: tuple[int, ...],
    block_size: int,
    elements: Sequence[jax.Array],
    of_blocks: Sequence[jax.Array] = (),
) -> tuple[jax.Array, ...]:
    """Apply a function to the blocks of arrays.

    It is called once for the whole blocks and once for the short ones at the ends of rows, if there
    are any: to pad these instead would cost a CPU ten times the time.

    Args:
      function: From blocks ``[*leading, b, block]`` of each array, and arrays ``[*leading, b]``, to
        a tuple of such arrays.
      shape: Shape of the arrays; see `layout_of`.
      block_size: Elements to a block.
      elements: Arrays in this shape.
      of_blocks: Arrays ``[*leading, blocks]``.

    Returns:
      For each array of the function's result one in ``shape``, or ``[*leading, blocks]``.
    """
    layout = layout_of(shape, block_size)
    axis, block = len(layout.leading), layout.block
    split_axis, merge_axes = explicit_sharding.split_axis, explicit_sharding.merge_axes
    if layout.merged > 1:
        elements = [merge_axes(x, axis, layout.merged) for x in elements]
    elements = [explicit_sharding.in_whole_runs(x, axis, block) for x in elements]

    def cut(x: jax.Array, start: int, stop: int) -> jax.Array:
        whole = stop - start == x.shape[axis]
        return x if whole else jax.lax.slice_in_dim(x, start, stop, axis=axis)

    whole = layout.width // block
    results = []
    for first, last, size in [(0, whole, block), (whole, layout.blocks, layout.width % block)]:
        if first < last or (layout.blocks == 0 and size == block):
            start, stop = first * block, first * block + (last - first) * size
            blocks = (split_axis(cut(x, start, stop), axis, (size,)) for x in elements)
            results.append(function(*blocks, *(cut(x, first, last) for x in of_blocks)))

    def joined(parts: Sequence[jax.Array]) -> jax.Array:
        in_blocks = parts[0].ndim > axis + 1
        rows = [merge_axes(x, axis, 2) for x in parts] if in_blocks else parts
        x = rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=axis)
        return split_axis(x, axis, shape[axis + 1 :]) if in_blocks and layout.merged > 1 else x

    return tuple(map(joined, zip(*results, strict=True)))
