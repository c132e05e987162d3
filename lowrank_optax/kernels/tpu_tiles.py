"""A tile's Adam step in a TPU's VMEM, with moments in codes: what the TPU kernels share.

A tile is cut into chunks of 32 rows, a tile of bytes, by one block of columns: what is in registers
at a time. Where 4-bit codes are paired, a chunk of bytes holds the codes of two chunks of values.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from lowrank_optax.kernels.adam import AdamScalars, adam_direction, adam_moments
from lowrank_optax.quantization import BlockFormat, decode_blocks, encode_blocks

CHUNK = 32
LANES = 128
Place = tuple[Any, ...]


class CodedTile(NamedTuple):
    """A tile of moments in codes.

    Attributes:
      formats: Of both moments.
      halves: 2 if tiles of values come in pairs, whose codes share bytes. Otherwise 1.
      row_halves: 2 if codes of rows 32 apart share bytes. Otherwise 1.
      rows: Rows of values.
      columns: Columns: whole blocks.
      width: Columns of the whole array.
      blocks: Blocks to a row of it.
    """

    formats: tuple[BlockFormat, BlockFormat]
    halves: int
    row_halves: int
    rows: int
    columns: int
    width: int
    blocks: int

    @property
    def block(self) -> int:
        return self.formats[0].block_size

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Half and half of the rows, of the values whose codes share bytes."""
        return [(h, r) for h in range(self.halves) for r in range(self.row_halves)]


def step_in_tile(
    tile: CodedTile,
    first_block: Any,
    s: AdamScalars,
    old: Sequence[Any],
    new: Sequence[Any],
    gradient: Callable[[Place], jax.Array],
    move: Callable[[Place, jax.Array], None],
) -> None:
    """Moments of a tile after a gradient, and what moves along them.

    Args:
      tile: Its shape.
      first_block: Number of the tile's first block in its rows.
      s: Learning rate and the like.
      old: References of codes ``[rows of bytes, columns]`` and scales ``[halves, rows, blocks]`` of
        the first moment, and of the second.
      new: The same, to be written.
      gradient: Reads the float32 gradient at ``(half, rows, columns)``.
      move: Takes Adam's direction there.
    """

    def chunk(index: jax.Array, carry: None) -> None:
        packed = _rows(index)
        rows = [(h, _rows(index * tile.row_halves + r), slice(None)) for h, r in tile.parts]
        scales = [[[pair[at] for at in rows] for pair in refs[1::2]] for refs in (old, new)]
        for j in range(tile.columns // tile.block):
            columns = pl.ds(j * tile.block, tile.block)
            words = [ref[packed, columns].astype(jnp.int32) for ref in old[::2]]
            codes = []
            for p, (half, at, _) in enumerate(rows):
                place = half, at, columns
                picked = [both[p] for both in scales[0]]
                written = [both[p] for both in scales[1]]
                coded = _step_in_chunk(
                    tile,
                    first_block + j,
                    s,
                    gradient(place),
                    [_part(word, p, tile) for word in words],
                    picked,
                    written,
                    lambda direction, place=place: move(place, direction),
                )
                codes.append([c for c, _ in coded])
                for both, (_, scale) in zip(scales[1], coded, strict=True):
                    both[p] = scale
            for k, ref in enumerate(new[::2]):
                word = codes[0][k] if len(codes) == 1 else codes[0][k] | (codes[1][k] << 4)
                ref[packed, columns] = word.astype(jnp.uint8)
        for ref, both in zip(new[1::2], scales[1], strict=True):
            for at, scale in zip(rows, both, strict=True):
                ref[at] = scale

    jax.lax.fori_loop(0, tile.rows // (CHUNK * tile.row_halves), chunk, None)


def _step_in_chunk(
    tile: CodedTile,
    number: Any,
    s: AdamScalars,
    gradient: jax.Array,
    codes: list[jax.Array],
    old_scales: list[jax.Array],
    new_scales: list[jax.Array],
    move: Callable[[jax.Array], None],
) -> list[tuple[jax.Array, jax.Array]]:
    """New codes of a chunk, and the scales of all blocks of its rows with its own written."""
    # A block's scale is found by its number, not indexed: lanes cannot be.
    is_block = _lane((CHUNK, tile.blocks)) == number
    inside = _lane((CHUNK, tile.block)) + number * tile.block < tile.width
    first, second = [
        decode_blocks(c, jnp.sum(jnp.where(is_block, x, 0), axis=-1, keepdims=True), f)
        for c, x, f in zip(codes, old_scales, tile.formats, strict=True)
    ]
    moments = adam_moments(gradient, first, second, s)
    move(adam_direction(*moments, s))
    result = []
    for moment, scales, f in zip(moments, new_scales, tile.formats, strict=True):
        kept = jnp.where(inside & jnp.isfinite(moment), moment, 0)
        scale = jnp.max(jnp.abs(kept), axis=-1, keepdims=True)
        result.append((encode_blocks(kept, scale, f), jnp.where(is_block, scale, scales)))
    return result


def _rows(chunk: Any) -> Any:
    return pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)


def _lane(shape: tuple[int, int]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _part(words: jax.Array, part: int, tile: CodedTile) -> jax.Array:
    """Codes of a part, of bytes that hold one or two."""
    return words if len(tile.parts) == 1 else (words >> 4 * part) & 15
