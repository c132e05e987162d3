"""Codes of a few bits in as few bytes, in layouts that compilers fuse with what makes them.

Codes that share a byte lie far apart, in another eighth of an axis: neighbours would have to be
moved between the lanes of an accelerator's registers first. They are packed in two stages, into
numbers of 4 bits and those into bytes: for bytes made of eight parts at once the TPU's compiler
needs more temporary memory.
"""

from collections.abc import Iterable
import functools
import itertools
import math
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.matrices import explicit_sharding

PackingName: TypeAlias = Literal["auto", "planes", "nibbles", "uint4", "uint8"]
Parts: TypeAlias = tuple[jax.Array, ...]

_ELEMENTWISE = ("uint4", "uint8")  # the other layouts join distant codes


def pack(codes: jax.Array, bits: int, packing: PackingName = "auto") -> Parts:
    """Arrays that hold the codes, and nothing else; see `unpack`.

    ============= ====== ========================================== =============================
    packing       bits   arrays                                     bytes of n codes
    ============= ====== ========================================== =============================
    ``"planes"``  1 to 8 uint8, each with codes an eighth apart     ``bits·n/8``
    ``"nibbles"`` 1 to 8 uint4, each with codes a quarter apart     ``bits·n/8``
    ``"uint4"``   1 to 4 uint4, one code in each                    ``n/2``
    ``"uint8"``   1 to 8 uint8, one code in each                    ``n``
    ``"auto"``    1 to 8 to 3 ``"planes"``; 4 ``"uint4"``; 5 to 7   ``bits·n/8``
                         uint4 and the rest in planes; 8 uint8.
    ============= ====== ========================================== =============================

    ``"auto"`` depends on JAX's default backend: a TPU gets nibbles instead of planes, and a CPU
    planes instead of uint4, which takes a whole byte there.

    `packed_bytes` says them exactly. ``"uint4"`` and ``"uint8"`` are elementwise, so good for any
    sharding. The others split an axis whose size is a multiple of 8: the last but one, or the next
    before it, or else the last, so that batches stay where they are. An array without such an axis
    is flattened, with up to 7 zeros at its end. Where the axis that is split is shared by devices,
    as that of rows ``[tokens, features]`` is, they exchange codes: use ``"uint4"`` there. On a mesh
    with explicit axes one that is not sharded is split instead, if there is one.

    Args:
      codes: uint8, below ``2**bits``, of any shape.
      bits: 1 to 8.
      packing: As above. Compiled for a TPU ``"nibbles"`` needs no temporary memory, ``"planes"`` 1
        to 4 bytes for each code of one layer; on a CPU ``"nibbles"`` takes about ten times as long.

    Raises:
      ValueError: If ``bits`` or ``packing`` is none of these, or ``"uint4"`` and ``bits`` above 4.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax.activations.packing import pack, unpack
      >>> codes = jnp.array([5, 2, 7, 0, 3, 6, 1, 4], jnp.uint8)
      >>> [part.tolist() for part in pack(codes, 3)]
      [[45], [7], [227]]
      >>> unpack(pack(codes, 3), (8,), 3).tolist()
      [5, 2, 7, 0, 3, 6, 1, 4]
    """
    layouts = _layouts(bits, packing)
    if not codes.size:
        return (codes.astype(jnp.uint8),)
    parts: list[jax.Array] = []
    for width, layout in layouts:
        parts += _pack_width(codes & (2**width - 1), width, layout)
        codes >>= width
    return tuple(parts)


def unpack(
    packed: Parts, shape: tuple[int, ...], bits: int, packing: PackingName = "auto"
) -> jax.Array:
    """The codes, uint8 of that shape, of what `pack` made of them."""
    layouts = _layouts(bits, packing)
    if not math.prod(shape):
        return packed[0]
    parts, codes, shift = iter(packed), jnp.uint8(0), 0
    for width, layout in layouts:
        count = 1 if layout in _ELEMENTWISE else _arrays(width)
        mine = tuple(itertools.islice(parts, count))
        codes |= _unpack_width(mine, shape, width, layout) << shift
        shift += width
    return codes


def packed_bytes(shape: tuple[int, ...], bits: int, packing: PackingName = "auto") -> int:
    """Bytes of what `pack` makes of codes of that shape, two numbers of 4 bits to a byte.

    JAX's own ``nbytes`` counts a whole byte for a number of 4 bits.

    Example:
      >>> from lowrank_optax.activations.packing import packed_bytes
      >>> [packed_bytes((1024, 4096), bits) / 2**20 for bits in (1, 2, 3, 4)]
      [0.5, 1.0, 1.5, 2.0]
    """
    n = math.prod(shape)
    sizes = {"uint8": n, "uint4": -(-n // 2)}
    return sum(sizes.get(layout, width * -(-n // 8)) for width, layout in _layouts(bits, packing))


def _layouts(bits: int, packing: PackingName) -> list[tuple[int, str]]:
    """Low bits first: how many, and how they are laid out. Refuses what there is not."""
    names = get_args(PackingName)
    if bits not in range(1, 9):
        raise ValueError(f"bits={bits!r} must be an integer from 1 to 8.")
    if packing not in names:
        raise ValueError(f"packing={packing!r} must be one of {', '.join(names)}.")
    if packing == "uint4" and bits > 4:
        raise ValueError(f'packing="uint4" holds codes of at most 4 bits; these have bits={bits}.')
    if packing == "uint8" or (packing == "auto" and bits == 8):
        return [(bits, "uint8")]
    if packing == "uint4":
        return [(bits, "uint4")]
    backend = jax.default_backend()
    if packing == "auto":
        packing = "nibbles" if backend == "tpu" else "planes"
        four = "planes" if backend == "cpu" else "uint4"  # a CPU stores uint4 in whole bytes
    else:
        four = "planes" if packing == "planes" else "uint4"
    rest = packing
    if bits < 4:
        return [(bits, rest)]
    return [(4, four)] + ([(bits - 4, four if bits == 8 else rest)] if bits > 4 else [])


def _pack_width(codes: jax.Array, bits: int, layout: str) -> list[jax.Array]:
    """Codes of at most 4 bits, or of 8 as bytes."""
    if layout in _ELEMENTWISE:
        return [codes.astype(layout)]
    codes, axis = _with_eighths(codes)
    parts = [part.astype(jnp.uint4) for part in _to_nibbles(codes, axis, bits)]
    if layout == "nibbles":
        return parts
    halves = [jnp.split(part, 2, axis) for part in _uint8(jax.lax.optimization_barrier(parts))]
    return [low | (high << 4) for low, high in halves]


def _unpack_width(packed: Parts, shape: tuple[int, ...], bits: int, layout: str) -> jax.Array:
    """The inverse of `_pack_width`."""
    if layout in _ELEMENTWISE:
        return packed[0].astype(jnp.uint8)
    axis = _axis_of_eighths(shape, packed[0].shape)
    if layout == "planes":
        bytes_ = [jnp.concatenate([part & 15, part >> 4], axis) for part in packed]
        packed = jax.lax.optimization_barrier(tuple(part.astype(jnp.uint4) for part in bytes_))
    codes = _from_nibbles(_uint8(packed), axis, bits)
    return codes if codes.shape == shape else codes[: math.prod(shape)].reshape(shape)


def _uint8(parts: Iterable[jax.Array]) -> list[jax.Array]:
    """On no device is there arithmetic in 4 bits."""
    return [part.astype(jnp.uint8) for part in parts]


def _arrays(bits: int) -> int:
    """How many arrays of 4 bits hold codes of up to 4 bits: quarters, or all of them."""
    return 1 if bits == 4 else bits


def _to_nibbles(codes: jax.Array, axis: int, bits: int) -> list[jax.Array]:
    """Four quarters of an axis in ``bits`` quarters of 4 bits, as uint8.

    Number i holds the quarters i, i + bits, ...; three bits leave room for bit i of the last.
    """
    if bits == 4:
        return [codes]
    quarters = jnp.split(codes, 4, axis)
    parts = [_joined(quarters[i : 4 // bits * bits : bits], bits) for i in range(bits)]
    if bits == 3:
        parts = [part | (((quarters[3] >> i) & 1) << 3) for i, part in enumerate(parts)]
    return parts


def _from_nibbles(parts: list[jax.Array], axis: int, bits: int) -> jax.Array:
    """The inverse of `_to_nibbles`."""
    if bits == 4:
        return parts[0]
    shifts = range(0, 5 - bits, bits)
    quarters = [(part >> shift) & (2**bits - 1) for shift in shifts for part in parts]
    if bits == 3:
        quarters.append(_joined([part >> 3 for part in parts], 1))
    return jnp.concatenate(quarters, axis)


def _joined(fields: list[jax.Array], bits: int) -> jax.Array:
    """Fields of ``bits`` bits in one number, the first lowest."""
    shifted = (field << (bits * i) for i, field in enumerate(fields))
    return functools.reduce(jnp.bitwise_or, shifted)


def _with_eighths(codes: jax.Array) -> tuple[jax.Array, int]:
    """The codes, flattened and padded if need be, and the axis that is split into eighths."""
    partition = explicit_sharding.partition_of(codes)
    axes = [a for a in _split_order(codes.ndim) if codes.shape[a] % 8 == 0]
    sharded = lambda axis: partition is not None and partition[axis] is not None
    if axes:
        axis = min(axes, key=sharded)  # the first that is not, or the first
        return explicit_sharding.in_whole_runs(codes, axis, codes.shape[axis]), axis
    if partition is not None:
        codes = explicit_sharding.constrain(codes, PartitionSpec(*[None] * codes.ndim))
    return jnp.pad(codes.reshape(-1), (0, -codes.size % 8)), 0


def _split_order(ndim: int) -> Iterable[int]:
    """Axes by how gladly they are split: the last but one, those before it, the last."""
    return (*range(ndim - 2, -1, -1), *([ndim - 1] if ndim else []))


def _axis_of_eighths(shape: tuple[int, ...], packed: tuple[int, ...]) -> int:
    """The axis that `_with_eighths` chose: packing made it smaller."""
    if len(packed) != len(shape):
        return 0
    return next((axis for axis, size in enumerate(packed) if size != shape[axis]), 0)
