"""Adam with its moments in codes as one TPU kernel: everything is read once and written once.

grid     (outer, inner, row tiles, column tiles): columns last, as the scales of a tile of rows
         stay in VMEM while its columns pass
tile     ``rows`` × ``columns``, whole blocks: of gradient and parameter, of the codes the bytes
         that hold the tile, of the scales the rows with all their blocks
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from lowrank_optax.kernels.adam import (
    AdamScalars,
    applied,
    as_vector,
    from_vector,
    in_place,
    result_like,
)
from lowrank_optax.kernels.low_bit_adam.views import View, view_of
from lowrank_optax.kernels.moments import reason_against_formats
from lowrank_optax.kernels.tpu_tiles import CHUNK, LANES, CodedTile, Place, step_in_tile
from lowrank_optax.quantization import BlockFormat, Quantized

VMEM_BYTES = 12 * 2**20  # three quarters of what a kernel may take by default


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows and columns of a tile."""

    rows: int
    columns: int


def tiles_for(view: View, block: int, element_bytes: float) -> Tiles:
    """The largest tiles of about 1024 columns that fit, twice each."""
    columns = block * min(max(1, 1024 // block), view.blocks)
    unit = CHUNK * view.row_halves
    scales = 4 * 4 * -(-view.blocks // LANES) * LANES
    row_bytes = 2 * view.halves * (columns * element_bytes + scales)
    rows = min(VMEM_BYTES // (unit * row_bytes), 8, -(-view.rows // unit))
    return Tiles(unit * max(1, int(rows)), columns)


def element_bytes(gradient: Any, param: Any, formats: tuple[BlockFormat, BlockFormat]) -> float:
    """Bytes that an element's step reads and writes, without its scales."""
    codes = 2 * sum(fmt.map.bits for fmt in formats) / 8
    new = 4 if param is None else 2 * param.dtype.itemsize
    return gradient.dtype.itemsize + new + codes


def supports(
    gradient: Any,
    first: Quantized,
    second: Quantized,
    param: Any,
    scalars: AdamScalars,
    *,
    formats: tuple[BlockFormat, BlockFormat],
) -> str | None:
    """Why the kernel cannot take these, or None."""
    del first, second, scalars
    for x in (gradient,) if param is None else (gradient, param):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{x.dtype} is neither float32 nor bfloat16"
    reason = reason_against_formats(formats, "TPU")
    if reason is not None:
        return reason
    block = formats[0].block_size
    if block % LANES:
        return f"a block of {block} is no multiple of {LANES} lanes"
    try:
        view = view_of(gradient.shape, formats[0])
    except NotImplementedError as error:
        return str(error)
    tiles = tiles_for(view, block, element_bytes(gradient, param, formats))
    scales = 4 * 4 * view.blocks * tiles.rows
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
    formats: tuple[BlockFormat, BlockFormat],
    interpret: Any = False,
) -> tuple[jax.Array, Quantized, Quantized]:
    """See `lowrank_optax.kernels.low_bit_adam`; for what `supports` has nothing against."""
    view = view_of(gradient.shape, formats[0])
    block = formats[0].block_size
    tiles = tiles_for(view, block, element_bytes(gradient, param, formats))
    values = [view.values(gradient)] + ([] if param is None else [view.values(param)])
    states = [x for q in (first, second) for x in (view.codes(q.codes), view.scales(q.scales))]
    tile = CodedTile(
        formats, view.halves, view.row_halves, tiles.rows, tiles.columns, view.columns, view.blocks
    )
    specs = _block_specs(view, tiles)
    result = result_like(values[0], jnp.float32 if param is None else param.dtype)
    outputs = [result, *(result_like(x) for x in states)]
    new, *states = pl.pallas_call(
        functools.partial(_kernel, tile=tile),
        grid=(view.outer, view.inner, *_tile_counts(view, tiles)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *[specs["values"]] * len(values),
            *[specs["codes"], specs["scales"]] * 2,
        ],
        out_specs=[specs["values"], *[specs["codes"], specs["scales"]] * 2],
        out_shape=outputs,
        input_output_aliases=in_place(values, result, states),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost([*values, *states, result, *states]),
        interpret=interpret,
        name=f"low_bit_adam_{formats[0].map.bits}",
    )(as_vector(scalars), *values, *states)
    shapes = [x.shape for q in (first, second) for x in q]
    states = [x.reshape(shape) for x, shape in zip(states, shapes, strict=True)]
    return new.reshape(gradient.shape), Quantized(*states[:2]), Quantized(*states[2:])


def _tile_counts(view: View, tiles: Tiles) -> tuple[int, int]:
    return pl.cdiv(view.rows, tiles.rows), pl.cdiv(view.columns, tiles.columns)


def _block_specs(view: View, tiles: Tiles) -> dict[str, pl.BlockSpec]:
    rows, columns = tiles.rows, tiles.columns
    return {
        "values": pl.BlockSpec(
            (None, view.halves, None, rows, columns), lambda o, i, r, c: (o, 0, i, r, c)
        ),
        "codes": pl.BlockSpec(
            (None, None, rows // view.row_halves, columns), lambda o, i, r, c: (o, i, r, c)
        ),
        "scales": pl.BlockSpec(
            (None, view.halves, None, rows, view.blocks), lambda o, i, r, c: (o, 0, i, r, 0)
        ),
    }


def _cost(moved: list[Any]) -> pl.CostEstimate:
    size = moved[0].size
    return pl.CostEstimate(
        flops=150 * size,
        transcendentals=size,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
    )


def _kernel(scalars_ref: Any, *refs: Any, tile: CodedTile) -> None:
    values, old, (new, *states) = refs[:-9], refs[-9:-5], refs[-5:]
    s = from_vector(scalars_ref)

    def move(place: Place, direction: jax.Array) -> None:
        has_param = len(values) == 2
        new[place] = applied(direction, values[1][place], s) if has_param else direction

    gradient = lambda place: values[0][place].astype(jnp.float32)
    first_block = pl.program_id(3) * (tile.columns // tile.block)
    step_in_tile(tile, first_block, s, old, states, gradient, move)
