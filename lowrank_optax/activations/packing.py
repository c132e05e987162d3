"""Codes of a few bits in as few bytes, in layouts that compilers fuse with what makes them."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

PackingName: TypeAlias = Literal["auto", "uint4", "planes", "uint8"]

_PER_PLANE = {1: (1,), 2: (2,), 3: (2, 1)}


def pack(codes: jax.Array, bits: int, packing: PackingName = "auto") -> tuple[jax.Array, ...]:
    """Arrays that hold the codes, and nothing else; see `unpack`.

    Args:
      codes: uint8, below ``2**bits``, of any shape.
      bits: 1 to 8.
      packing: ``"uint4"``; ``"planes"``, bytes that hold codes of distant rows; ``"uint8"``, one
        code in each; ``"auto"`` chooses by ``bits``.
    """
    layout = _layout(bits, packing)
    if layout == "uint8":
        return (codes,)
    if layout == "uint4":
        return (codes.astype(jnp.uint4),)
    planes, shift = [], 0
    rows = codes.reshape(-1, codes.shape[-1]) if codes.ndim > 1 else codes.reshape(-1, 1)
    rows = jnp.pad(rows, ((0, -len(rows) % 8), (0, 0)))
    for width in _PER_PLANE[bits]:
        part, per_byte = (rows >> shift) & (2**width - 1), 8 // width
        size = len(rows) // per_byte
        plane = part[:size]
        for j in range(1, per_byte):
            plane |= part[j * size : (j + 1) * size] << (width * j)
        planes.append(plane)
        shift += width
    return tuple(planes)


def unpack(
    packed: tuple[jax.Array, ...], shape: tuple[int, ...], bits: int, packing: PackingName = "auto"
) -> jax.Array:
    """The codes, uint8 of that shape, of what `pack` made of them."""
    if _layout(bits, packing) != "planes":
        return packed[0].astype(jnp.uint8)
    codes, shift = jnp.uint8(0), 0
    for plane, width in zip(packed, _PER_PLANE[bits], strict=True):
        parts = [(plane >> (width * j)) & (2**width - 1) for j in range(8 // width)]
        codes |= jnp.concatenate(parts) << shift
        shift += width
    count = 1
    for size in shape[:-1] if len(shape) > 1 else shape:
        count *= size
    return codes[:count].reshape(shape)


def _layout(bits: int, packing: PackingName) -> str:
    if packing != "auto":
        return packing
    return "planes" if bits < 4 else "uint4" if bits == 4 else "uint8"
