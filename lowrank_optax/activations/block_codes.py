"""Numbers of any size in a few bits: codes, and one scale for each block of the last axis.

Of a derivative a fixed set of levels will do; what a linear layer returns has no fixed range.
Scales are bfloat16, with which the codes are then made, so that their rounding loses nothing.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.activations.step_function import Codebook
from lowrank_optax.quantization.blocks import over_blocks
from lowrank_optax.quantization.packing import pack, unpack

BLOCK_SIZE = 64

# By bits, the positive halves of the levels of least squared error for blocks of 64 numbers of a
# normal distribution, each over the largest size in its block.
LEVELS = {
    1: (0.313271,),
    2: (0.178326, 0.602461),
    3: (0.094453, 0.29191, 0.52056, 0.832718),
    4: (0.047389, 0.143184, 0.242185, 0.347086, 0.461575, 0.591395, 0.74686, 0.950611),
}


class BlockCodes(NamedTuple):
    """An array in codes.

    Attributes:
      codes: What `pack` makes of codes in the array's shape.
      scales: bfloat16 ``[*leading, blocks]``: the largest size in a block.
    """

    codes: tuple[jax.Array, ...]
    scales: jax.Array


def block_encode(x: jax.Array, bits: int) -> BlockCodes:
    """Codes of a float array of any shape; elements that are not finite become zero.

    Up to 4 bits, the levels are those of `LEVELS`; from 5 on they are evenly spaced around zero.
    Blocks lie along the last axis, or over several where that is short.
    """

    def encode(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
        blocks = jnp.where(jnp.isfinite(blocks), blocks, 0)
        scales = jnp.max(jnp.abs(blocks), axis=-1).astype(jnp.bfloat16)
        wide = scales.astype(jnp.float32)[..., None]
        usable = wide >= jnp.finfo(jnp.float32).tiny
        return _encode(jnp.where(usable, blocks / jnp.where(usable, wide, 1), 0), bits), scales

    shape = x.shape or (1,)
    wide = x.astype(jnp.float32).reshape(shape)
    codes, scales = over_blocks(encode, shape, BLOCK_SIZE, [wide])
    return BlockCodes(pack(codes.reshape(x.shape), bits), scales)


def block_decode(coded: BlockCodes, shape: tuple[int, ...], bits: int) -> jax.Array:
    """The float32 array of this shape that codes stand for."""

    def decode(codes: jax.Array, scales: jax.Array) -> tuple[jax.Array]:
        return (_decode(codes, bits) * scales.astype(jnp.float32)[..., None],)

    codes = unpack(coded.codes, shape, bits).reshape(shape or (1,))
    return over_blocks(decode, codes.shape, BLOCK_SIZE, [codes], [coded.scales])[0].reshape(shape)


def _encode(x: jax.Array, bits: int) -> jax.Array:
    """uint8 codes of the levels nearest to numbers around ``[-1, 1]``."""
    if bits in LEVELS:
        return _codebook(bits).encode(x)
    largest = 2 ** (bits - 1) - 1
    return (jnp.clip(jnp.round(x * largest), -largest, largest) + largest).astype(jnp.uint8)


def _decode(codes: jax.Array, bits: int) -> jax.Array:
    if bits in LEVELS:
        return _codebook(bits).decode(codes)
    largest = 2 ** (bits - 1) - 1
    return codes.astype(jnp.float32) / largest - 1


def _codebook(bits: int) -> Codebook:
    positive = LEVELS[bits]
    levels = tuple(-level for level in reversed(positive)) + positive
    middles = tuple((low + high) / 2 for low, high in itertools.pairwise(levels))
    return Codebook(middles, tuple(range(len(levels))), levels, bits)


def check_bits(bits: int | None, name: str = "bits") -> None:
    """Refuses what is no number of bits; None is one, of what is kept as it is."""
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    if bits is not None and not (whole and 1 <= bits <= 8):
        raise ValueError(f"{name}={bits!r} must be an integer from 1 to 8, or None.")
