"""What a step of the TPU kernel for projected Adam holds in VMEM, and how large its tiles are."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from lowrank_optax.kernels.moments import reason_against_formats
from lowrank_optax.kernels.tpu_tiles import CHUNK, LANES, CodedTile
from lowrank_optax.quantization import BlockFormat, layout_of, packing_of
from lowrank_optax.quantization.packing import ROWS_APART

VMEM_LIMIT = 56 * 2**20  # what the kernel may ask for: the newest chips have at least 64 MiB
BUDGET = VMEM_LIMIT * 3 // 4
LARGEST = 256  # of the kept axis
PIECES = (512, 256, 128)  # of the compressed axis

Formats = tuple[BlockFormat, BlockFormat] | None


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch of matrices ``[batch, m, n]`` and the subspace of each.

    Attributes:
      batch: Number of matrices.
      rows: ``m``.
      columns: ``n``.
      rank: Of the basis.
      axis: Which of the last two axes is compressed, -2 or -1.
    """

    batch: int
    rows: int
    columns: int
    rank: int
    axis: int

    @property
    def compressed(self) -> int:
        return self.rows if self.axis == -2 else self.columns

    @property
    def kept(self) -> int:
        return self.columns if self.axis == -2 else self.rows

    def along(self, tile: int, compressed: int) -> tuple[int, int]:
        """Rows and columns of a part with so much of the kept and the compressed axis."""
        return (compressed, tile) if self.axis == -2 else (tile, compressed)

    @property
    def moment(self) -> tuple[int, int, int]:
        return (self.batch, *self.along(self.kept, self.rank))

    def coded_tile(self, tile: int, formats: tuple[BlockFormat, BlockFormat]) -> CodedTile:
        """The tile of moments in codes that goes with a tile of the kept axis."""
        rows, columns = self.along(tile, self.rank)
        width = self.moment[-1]
        blocks = layout_of(self.moment, formats[0].block_size).blocks
        halves = 2 if formats[0].map.bits == 4 else 1
        return CodedTile(formats, 1, halves, rows, columns, width, blocks)


def shape_of(gradient: Any, basis: Any, axis: int) -> Shape:
    *batch, rows, columns = gradient.shape
    return Shape(math.prod(batch), rows, columns, basis.shape[-1], axis)


def stored_by_columns(shape: tuple[int, ...]) -> bool:
    """Whether TPUs store a matrix of this shape transposed, which takes less padding then."""
    if len(shape) != 2:
        return False
    stored = lambda rows, columns: -(-rows // 8) * 8 * -(-columns // LANES) * LANES
    return stored(shape[1], shape[0]) < stored(*shape)


def unit_of(shape: Shape, formats: Formats) -> int:
    """What the tile of the kept axis must be a multiple of."""
    if shape.axis == -2:
        return LANES if formats is None else formats[0].block_size
    return CHUNK * (2 if formats is not None and formats[0].map.bits == 4 else 1)


def tile_for(shape: Shape, gradient: Any, param: Any, formats: Formats) -> int:
    """The largest tile of the kept axis that fits.

    Raises:
      NotImplementedError: If none does.
    """
    unit = unit_of(shape, formats)
    largest = max(unit, min(LARGEST, -(-shape.kept // unit) * unit))
    for tile in range(largest // unit * unit, 0, -unit):
        if vmem_bytes(shape, tile, gradient, param, formats) <= BUDGET:
            return tile
    sizes = f"a tile of {gradient.shape} and the basis"
    raise NotImplementedError(f"{sizes} do not fit into {BUDGET >> 20} MiB of VMEM")


def vmem_bytes(shape: Shape, tile: int, gradient: Any, param: Any, formats: Formats) -> int:
    """Bytes of a step: what moves twice, as the next tile is fetched meanwhile; the rest once."""
    of = lambda rows, columns: -(-rows // 8) * 8 * -(-columns // LANES) * LANES
    values = of(*shape.along(tile, shape.compressed))
    moments = of(*shape.along(tile, shape.rank))
    moved = values * (gradient.dtype.itemsize + (4 if param is None else 2 * param.dtype.itemsize))
    if formats is None:
        moved += 2 * 2 * 4 * moments
    else:
        coded = shape.coded_tile(tile, formats)
        moved += 2 * 2 * (moments + 4 * of(coded.rows, coded.blocks))
    basis = of(shape.compressed, shape.rank) * 4
    piece = piece_of(shape)
    products = 3 * 4 * (of(*shape.along(tile, piece)) + of(piece, shape.rank))
    return 2 * moved + basis + products + 4 * 4 * moments


def piece_of(shape: Shape) -> int:
    """How much of the compressed axis is multiplied at a time."""
    return next((p for p in PIECES if shape.compressed % p == 0), shape.compressed)


def reason_against_codes(shape: Shape, formats: tuple[BlockFormat, BlockFormat]) -> str | None:
    """Why moments in these codes cannot be cut into tiles, or None."""
    reason = reason_against_formats(formats, "TPU")
    if reason is not None:
        return reason
    first = formats[0]
    if first.block_size % LANES:
        return f"a block of {first.block_size} is no multiple of {LANES} lanes"
    moment = shape.moment if shape.batch > 1 else shape.moment[1:]
    if moment[-1] < first.block_size:
        return f"the last axis of moments {moment} is shorter than a block"
    halves = 2 if first.map.bits == 4 else 1
    if halves == 2:
        packing = packing_of(moment)
        if packing.axis != len(moment) - 2 or packing.apart != ROWS_APART:
            return f"4-bit codes of moments {moment} are not packed along rows in runs of 64"
    fixed = shape.rank % (CHUNK * halves if shape.axis == -2 else first.block_size)
    if fixed:
        return f"rank {shape.rank} is not in whole chunks of codes"
    return None


def accepts(dtype: Any) -> bool:
    return dtype in (jnp.float32, jnp.bfloat16)
