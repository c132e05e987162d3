"""The arrays of one step as the TPU kernel cuts them: rows and columns, and axes before them."""

import math
from typing import NamedTuple

import jax

from lowrank_optax.quantization import BlockFormat, layout_of, packing_of
from lowrank_optax.quantization.packing import ROWS_APART


class View(NamedTuple):
    """An array ``[..., m, n]`` as ``[outer, halves, inner, m, n]``, its codes without the halves.

    Attributes:
      outer: Product of the axes before the packed one.
      halves: 2 if 4-bit codes are paired along an axis before the rows: then that axis is cut in
        runs of two halves. Otherwise 1.
      inner: Product of the axes between the outer ones and the rows.
      rows: Size of the axis before the last.
      columns: Size of the last.
      row_halves: 2 if 4-bit codes are paired along the rows, 32 apart. Otherwise 1.
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
        """A gradient, parameter or update ``[..., m, n]``."""
        return x.reshape(self.values_shape)

    def codes(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.codes_shape)

    def scales(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.scales_shape)

    @property
    def values_shape(self) -> tuple[int, ...]:
        return (self.outer, self.halves, self.inner, self.rows, self.columns)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        return (self.outer, self.inner, self.rows // self.row_halves, self.columns)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        return (self.outer, self.halves, self.inner, self.rows, self.blocks)


def view_of(shape: tuple[int, ...], fmt: BlockFormat) -> View:
    """How the kernel sees an array of this shape.

    Raises:
      NotImplementedError: If it does not, with the reason.
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
