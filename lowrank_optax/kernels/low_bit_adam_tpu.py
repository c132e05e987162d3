"""Adam with its moments in codes as one TPU kernel: everything is read once and written once.

grid     (outer, inner, row tiles, column tiles): columns last, as the scales of a tile of rows
         stay in VMEM while its columns pass
tile     ``rows`` × ``columns``, whole blocks: of gradient and parameter, of the codes the bytes
         that hold the tile, of the scales the rows with all their blocks
chunk    32 rows, a tile of bytes, by one block of columns: what is in registers at a time; where
         4-bit codes are paired, a chunk of bytes holds the codes of two chunks of values
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from lowrank_optax.kernels.adam import (
    AdamScalars,
    adam_direction,
    adam_moments,
    applied,
    as_float32,
    in_place,
    reason_against_formats,
    result_like,
)
from lowrank_optax.quantization import (
    BlockFormat,
    Quantized,
    decode_blocks,
    encode_blocks,
    layout_of,
    packing_of,
)
from lowrank_optax.quantization.packing import ROWS_APART

CHUNK = 32
LANES = 128
VMEM_BYTES = 12 * 2**20  # three quarters of what a kernel may take by default

Formats = tuple[BlockFormat, BlockFormat]


class View(NamedTuple):
    """An array ``[..., m, n]`` as ``[outer, halves, inner, m, n]``, its codes without the halves.

    Attributes:
      outer: Product of the axes before the packed one.
      halves: 2 if 4-bit codes are paired along an axis before the rows, which is then cut in runs
        of two halves; otherwise 1.
      inner: Product of the axes between the outer ones and the rows.
      rows: Size of the axis before the last.
      columns: Size of the last axis.
      row_halves: 2 if 4-bit codes are paired along the rows, 32 apart; otherwise 1.
      blocks: Blocks to a row.
    """

    outer: int
    halves: int
    inner: int
    rows: int
    columns: int
    row_halves: int
    blocks: int

    def values(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.outer, self.halves, self.inner, self.rows, self.columns)

    def states(self, moment: Quantized) -> list[jax.Array]:
        shape = (self.outer, self.inner, self.rows // self.row_halves, self.columns)
        scales = moment.scales.reshape(*self[:3], self.rows, self.blocks)
        return [moment.codes.reshape(shape), scales]


def view_of(shape: tuple[int, ...], fmt: BlockFormat) -> View:
    """How the kernel sees an array of this shape.

    Raises:
      NotImplementedError: If it does not support the shape, with the reason.
    """
    if len(shape) < 2 or 0 in shape:
        raise NotImplementedError(f"shape {shape} has no rows and columns")
    layout = layout_of(shape, fmt.block_size)
    if layout.merged > 1 or layout.width < fmt.block_size:
        size = fmt.block_size
        raise NotImplementedError(f"the last axis of {shape} is shorter than a block of {size}")
    *batch, rows, columns = shape
    plain = View(1, 1, math.prod(batch), rows, columns, 1, layout.blocks)
    if fmt.map.bits == 8:
        return plain
    packing = packing_of(shape)
    if packing.padding:
        raise NotImplementedError(f"4-bit codes of {shape} are packed along an odd axis")
    if packing.axis == len(shape) - 2:
        if packing.apart != ROWS_APART:
            why = f"4-bit codes of {shape} are packed along rows in no multiple of 64"
            raise NotImplementedError(why)
        return plain._replace(row_halves=2)
    run = 2 * packing.apart
    outer = math.prod(batch[: packing.axis]) * (batch[packing.axis] // run)
    inner = packing.apart * math.prod(batch[packing.axis + 1 :])
    return plain._replace(outer=outer, halves=2, inner=inner)


class Tile(NamedTuple):
    """Rows and columns of a tile, and what of the array it is cut from."""

    rows: int
    columns: int
    view: View
    formats: Formats

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Half and half of the rows, of the values whose codes share bytes."""
        return [(h, r) for h in range(self.view.halves) for r in range(self.view.row_halves)]


def tile_of(view: View, gradient: Any, param: Any, formats: Formats) -> Tile:
    """The largest tile of about 1024 columns that fits twice, as the next is fetched meanwhile."""
    codes = 2 * sum(fmt.map.bits for fmt in formats) / 8
    new = 4 if param is None else 2 * param.dtype.itemsize
    block = formats[0].block_size
    columns = block * min(max(1, 1024 // block), view.blocks)
    unit = CHUNK * view.row_halves
    scales = 4 * 4 * -(-view.blocks // LANES) * LANES
    row_bytes = 2 * view.halves * (columns * (gradient.dtype.itemsize + new + codes) + scales)
    rows = min(VMEM_BYTES // (unit * row_bytes), 8, -(-view.rows // unit))
    return Tile(unit * max(1, int(rows)), columns, view, formats)


def supports(
    gradient: Any,
    first: Quantized,
    second: Quantized,
    param: Any,
    scalars: AdamScalars,
    *,
    formats: Formats,
) -> str | None:
    """Why the kernel does not support these arguments, or None."""
    del first, second, scalars
    for x in (gradient,) if param is None else (gradient, param):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{x.dtype} is neither float32 nor bfloat16"
    reason = reason_against_formats(formats)
    if reason is not None:
        return reason
    block = formats[0].block_size
    if block % LANES:
        return f"a block of {block} is no multiple of {LANES} lanes"
    try:
        view = view_of(gradient.shape, formats[0])
    except NotImplementedError as error:
        return str(error)
    scales = 4 * 4 * view.blocks * tile_of(view, gradient, param, formats).rows
    if 2 * view.halves * scales > VMEM_BYTES // 2:
        return f"the scales of {view.blocks} blocks to a row do not fit"
    return None


def run(
    gradient: jax.Array,
    first: Quantized,
    second: Quantized,
    param: jax.Array | None,
    scalars: AdamScalars,
    *,
    formats: Formats,
    interpret: Any = False,
) -> tuple[jax.Array, Quantized, Quantized]:
    """See `lowrank_optax.kernels.low_bit_adam`, for arguments that `supports` accepts."""
    view = view_of(gradient.shape, formats[0])
    tile = tile_of(view, gradient, param, formats)
    values = [view.values(x) for x in (gradient, param) if x is not None]
    states = [*view.states(first), *view.states(second)]
    value_spec = pl.BlockSpec(
        (None, view.halves, None, tile.rows, tile.columns), lambda o, i, r, c: (o, 0, i, r, c)
    )
    code_spec = pl.BlockSpec(
        (None, None, tile.rows // view.row_halves, tile.columns), lambda o, i, r, c: (o, i, r, c)
    )
    scale_spec = pl.BlockSpec(
        (None, view.halves, None, tile.rows, view.blocks), lambda o, i, r, c: (o, 0, i, r, 0)
    )
    result = result_like(values[0], jnp.float32 if param is None else param.dtype)
    moved = [*values, *states, result, *states]
    new, *states = pl.pallas_call(
        functools.partial(_kernel, tile=tile),
        grid=(
            view.outer,
            view.inner,
            pl.cdiv(view.rows, tile.rows),
            pl.cdiv(view.columns, tile.columns),
        ),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *[value_spec] * len(values),
            *[code_spec, scale_spec] * 2,
        ],
        out_specs=[value_spec, *[code_spec, scale_spec] * 2],
        out_shape=[result, *(result_like(x) for x in states)],
        input_output_aliases=in_place(values, result, states),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=150 * gradient.size,
            transcendentals=gradient.size,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        ),
        interpret=interpret,
        name=f"low_bit_adam_{formats[0].map.bits}",
    )(jnp.stack(as_float32(scalars)), *values, *states)
    shapes = [x.shape for q in (first, second) for x in q]
    states = [x.reshape(shape) for x, shape in zip(states, shapes, strict=True)]
    return new.reshape(gradient.shape), Quantized(*states[:2]), Quantized(*states[2:])


def _kernel(scalars_ref: Any, *refs: Any, tile: Tile) -> None:
    values, old, (result, *new) = refs[:-9], refs[-9:-5], refs[-5:]
    scalars = AdamScalars(*(scalars_ref[i] for i in range(len(AdamScalars._fields))))
    block = tile.formats[0].block_size
    first_block = pl.program_id(3) * (tile.columns // block)

    def step(index: jax.Array, carry: None) -> None:
        packed = _chunk_rows(index)
        rows = [
            (h, _chunk_rows(index * tile.view.row_halves + r), slice(None)) for h, r in tile.parts
        ]
        scales = [[[pair[at] for at in rows] for pair in refs[1::2]] for refs in (old, new)]
        for j in range(tile.columns // block):
            columns = pl.ds(j * block, block)
            words = [ref[packed, columns].astype(jnp.int32) for ref in old[::2]]
            new_words: list[Any] = [0, 0]
            for p, (half, at, _) in enumerate(rows):
                at_values = half, at, columns
                codes = [w if len(rows) == 1 else (w >> 4 * p) & 15 for w in words]
                direction, coded = _step_in_chunk(
                    tile,
                    first_block + j,
                    scalars,
                    values[0][at_values].astype(jnp.float32),
                    codes,
                    [each[p] for each in scales[0]],
                    [each[p] for each in scales[1]],
                )
                if len(values) == 2:
                    direction = applied(direction, values[1][at_values], scalars)
                result[at_values] = direction
                for k, (code, scale) in enumerate(coded):
                    new_words[k] |= code << 4 * p
                    scales[1][k][p] = scale
            for ref, word in zip(new[::2], new_words, strict=True):
                ref[packed, columns] = word.astype(jnp.uint8)
        for ref, each in zip(new[1::2], scales[1], strict=True):
            for at, scale in zip(rows, each, strict=True):
                ref[at] = scale

    jax.lax.fori_loop(0, tile.rows // (CHUNK * tile.view.row_halves), step, None)


def _step_in_chunk(
    tile: Tile,
    number: Any,
    scalars: AdamScalars,
    gradient: jax.Array,
    codes: list[jax.Array],
    old_scales: list[jax.Array],
    new_scales: list[jax.Array],
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """Adam's direction; of both moments the new codes, and the scales of all blocks of the rows."""
    # A block's scale is found by its number, not indexed: lanes cannot be.
    lane = lambda width: jax.lax.broadcasted_iota(jnp.int32, (CHUNK, width), 1)
    block = tile.formats[0].block_size
    is_block = lane(tile.view.blocks) == number
    inside = lane(block) + number * block < tile.view.columns
    first, second = [
        decode_blocks(c, jnp.sum(jnp.where(is_block, x, 0), axis=-1, keepdims=True), f)
        for c, x, f in zip(codes, old_scales, tile.formats, strict=True)
    ]
    moments = adam_moments(gradient, first, second, scalars)
    coded = []
    for moment, scales, f in zip(moments, new_scales, tile.formats, strict=True):
        finite = jnp.where(inside & jnp.isfinite(moment), moment, 0)
        scale = jnp.max(jnp.abs(finite), axis=-1, keepdims=True)
        coded.append((encode_blocks(finite, scale, f), jnp.where(is_block, scale, scales)))
    return adam_direction(*moments, scalars), coded


def _chunk_rows(chunk: Any) -> Any:
    return pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)
