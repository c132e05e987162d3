"""Two 4-bit codes to a byte.

Codes are paired along an axis before the last: neighbours in the last lie in one vector register of
an accelerator, and would have to be moved to be packed. Partners are 32 rows apart (a tile of bytes
on a TPU), not half an array, so that a byte stays on one device where rows are sharded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import explicit_sharding

ROWS_APART = 32
ELEMENTS_APART = 128  # of an array of one axis


class Packing(NamedTuple):
    """How codes are paired: element ``j`` of an axis with ``j + apart``, in runs of ``2·apart``.

    Attributes:
      axis: The axis, which has half the size in bytes.
      apart: Distance of partners.
      padding: 1 if the axis is odd: the high half of the last byte is then zero.
    """

    axis: int
    apart: int
    padding: int


def packing_of(shape: tuple[int, ...]) -> Packing:
    """How an array of this shape is packed: along the last axis that suits, but for the very last.

    Example:
      >>> from lowrank_optax.quantization.packing import packing_of
      >>> packing_of((24, 2048, 5461))
      Packing(axis=1, apart=32, padding=0)
      >>> packing_of((3, 5))
      Packing(axis=0, apart=2, padding=1)
    """
    # Not along the first of three axes or more, where stacked layers may be updated one by one.
    axes = range(max(0, len(shape) - 2), 0 if len(shape) > 2 else -1, -1)
    apart = ROWS_APART if len(shape) > 1 else ELEMENTS_APART
    in_runs = [a for a in axes if shape[a] % (2 * apart) == 0]
    even = [a for a in axes if shape[a] % 2 == 0]
    if in_runs:
        return Packing(in_runs[0], apart, 0)
    axis = even[0] if even else max(axes, key=lambda a: shape[a])
    return Packing(axis, -(-shape[axis] // 2), shape[axis] % 2)


def pack(codes: jax.Array) -> jax.Array:
    """Bytes of 4-bit codes: uint8, with one axis of half the size; see `packing_of`.

    Args:
      codes: Integers from 0 to 15, of at least one axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax.quantization import pack, unpack
      >>> codes = jnp.array([[1, 2], [3, 4]])
      >>> pack(codes).tolist()
      [[49, 66]]
      >>> unpack(pack(codes), (2, 2)).tolist()
      [[1, 2], [3, 4]]
    """
    if codes.size == 0:
        return codes.astype(jnp.uint8)
    axis, apart, padding = packing_of(codes.shape)
    codes = explicit_sharding.in_whole_runs(codes.astype(jnp.uint8), axis, 2 * apart)
    codes = jnp.pad(codes, [(0, padding * (a == axis)) for a in range(codes.ndim)])
    runs = explicit_sharding.split_axis(codes, axis, (2, apart))
    low, high = (jax.lax.index_in_dim(runs, i, axis + 1, keepdims=False) for i in (0, 1))
    return explicit_sharding.merge_axes(low | (high << 4), axis, 2)


def unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The codes ``shape``, uint8, of bytes made by `pack`."""
    if packed.size == 0:
        return packed
    axis, apart, _ = packing_of(shape)
    packed = explicit_sharding.in_whole_runs(packed, axis, apart)
    runs = explicit_sharding.split_axis(packed, axis, (apart,))
    codes = jnp.stack([runs & 15, runs >> 4], axis=axis + 1)
    codes = explicit_sharding.merge_axes(codes, axis, 3)
    return jax.lax.slice_in_dim(codes, 0, shape[axis], axis=axis)
