"""Pack codes of 1 to 8 bits into bytes, in layouts that compilers fuse with what makes the codes.

Codes that share a byte never are neighbours in the last axis: these lie in one vector register of
an accelerator, and would have to be moved between its lanes first.
"""

import functools
import itertools
import math
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.matrices import explicit_sharding

PackingName: TypeAlias = Literal["auto", "planes", "nibbles", "uint4", "uint8", "rows"]
Parts: TypeAlias = tuple[jax.Array, ...]

ROWS_APART = 32
ELEMENTS_APART = 128  # of an array of one axis


def pack(codes: jax.Array, bits: int, packing: PackingName = "auto") -> Parts:
    """Pack codes into arrays that hold nothing else; `unpack` is the inverse.

    ============= ====== ========================================== =============================
    packing       bits   arrays                                     bytes of n codes
    ============= ====== ========================================== =============================
    ``"planes"``  1 to 8 uint8, each with codes an eighth apart     ``bits·n/8``
    ``"nibbles"`` 1 to 8 uint4, each with codes a quarter apart     ``bits·n/8``
    ``"uint4"``   1 to 4 uint4, one code in each                    ``n/2``
    ``"uint8"``   1 to 8 uint8, one code in each                    ``n``
    ``"rows"``    4, 8   one of uint8; 4 bits: two codes in each,   ``bits·n/8``
                         as `packing_of` says
    ``"auto"``    1 to 8 to 3 ``"planes"``; 4 ``"uint4"``; 5 to 7   ``bits·n/8``
                         both, for 4 bits and for the remaining
                         ones; 8 ``"uint8"``
    ============= ====== ========================================== =============================

    ``"auto"`` depends on JAX's default backend: a TPU gets nibbles instead of planes, and a CPU
    planes instead of uint4, which takes a whole byte there.

    ``"uint4"`` and ``"uint8"`` are elementwise and suit any sharding. ``"rows"`` pairs codes 32
    rows apart, so that a byte stays on one device. ``"planes"`` and ``"nibbles"`` split an axis
    whose size is a multiple of 8: the last but one, or the next before it, or else the last, so
    that batches stay where they are. An array without such an axis is flattened, with up to 7 zeros
    at its end. Where that axis is sharded, devices exchange codes; on a mesh with explicit axes an
    axis that is not sharded is split instead, if there is one.

    Args:
      codes: Integers below ``2**bits``, of any shape; of at least one axis for ``"rows"``.
      bits: 1 to 8.
      packing: Layout, as above. Compiled for a TPU ``"nibbles"`` needs no temporary memory, and
        ``"planes"`` 1 to 4 bytes for each code; on a CPU ``"nibbles"`` is ten times as slow.

    Raises:
      ValueError: If ``bits`` or ``packing`` is out of range, or they do not go together.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax.quantization import pack, unpack
      >>> codes = jnp.array([5, 2, 7, 0, 3, 6, 1, 4], jnp.uint8)
      >>> [part.tolist() for part in pack(codes, 3)]
      [[45], [7], [227]]
      >>> unpack(pack(codes, 3), (8,), 3).tolist()
      [5, 2, 7, 0, 3, 6, 1, 4]
    """
    fields, codes = _fields(bits, packing), codes.astype(jnp.uint8)
    if not codes.size:
        return (codes,)
    *lower, (width, layout) = fields
    parts = []
    for low, low_layout in lower:
        parts += _pack_field(codes & (2**low - 1), low, low_layout)
        codes >>= low
    return tuple(parts + _pack_field(codes, width, layout))


def unpack(
    packed: Parts, shape: tuple[int, ...], bits: int, packing: PackingName = "auto"
) -> jax.Array:
    """The codes, uint8 in this shape, of what `pack` made of them."""
    fields = _fields(bits, packing)
    if not math.prod(shape):
        return packed[0]
    parts, codes, shift = iter(packed), [], 0
    for width, layout in fields:
        count = width if layout in ("planes", "nibbles") and width < 4 else 1
        field = _unpack_field(tuple(itertools.islice(parts, count)), shape, width, layout)
        codes.append(field << shift if shift else field)
        shift += width
    return functools.reduce(jnp.bitwise_or, codes)


def packed_bytes(shape: tuple[int, ...], bits: int, packing: PackingName = "auto") -> int:
    """Bytes of what `pack` makes of codes of this shape, with two uint4 to a byte.

    JAX's own ``nbytes`` counts a whole byte for a uint4.

    Example:
      >>> from lowrank_optax.quantization import packed_bytes
      >>> [packed_bytes((1024, 4096), bits) / 2**20 for bits in (1, 2, 3, 4)]
      [0.5, 1.0, 1.5, 2.0]
    """
    n, fields = math.prod(shape), _fields(bits, packing)
    if (4, "rows") in fields and n and shape:
        axis, _, padding = packing_of(shape)
        return (n + padding * n // shape[axis]) // 2
    sizes = {"uint8": n, "rows": n, "uint4": -(-n // 2)}
    return sum(sizes.get(layout, width * -(-n // 8)) for width, layout in fields)


class Packing(NamedTuple):
    """How 4-bit codes share bytes: element ``j`` with ``j + apart``, in runs of ``2·apart``.

    Attributes:
      axis: The axis, which has half the size in bytes.
      apart: Distance of partners.
      padding: 1 if the axis is odd: the high half of the last byte is then zero.
    """

    axis: int
    apart: int
    padding: int


def packing_of(shape: tuple[int, ...]) -> Packing:
    """Where ``packing="rows"`` pairs codes of this shape: along the last suitable axis but one.

    Example:
      >>> from lowrank_optax.quantization import packing_of
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


def _fields(bits: int, packing: PackingName) -> list[tuple[int, str]]:
    """The bits of a code, low ones first: how many, and their layout."""
    names = get_args(PackingName)
    if bits not in range(1, 9):
        raise ValueError(f"bits={bits!r} must be an integer from 1 to 8.")
    if packing not in names:
        raise ValueError(f"packing={packing!r} must be one of {', '.join(names)}.")
    if packing == "uint4" and bits > 4:
        raise ValueError(f'packing="uint4" holds codes of at most 4 bits; these have bits={bits}.')
    if packing == "rows" and bits not in (4, 8):
        raise ValueError(f'packing="rows" holds codes of 4 or 8 bits; these have bits={bits}.')
    if packing in ("uint4", "uint8"):
        return [(bits, packing)]
    if bits == 8 and packing in ("auto", "rows"):
        return [(8, "uint8")]
    backend = jax.default_backend()
    four = packing  # of four bits at once
    if packing == "auto":
        packing = "nibbles" if backend == "tpu" else "planes"
        four = "planes" if backend == "cpu" else "uint4"  # a CPU stores uint4 in whole bytes
    elif packing == "nibbles":
        four = "uint4"
    if bits < 4:
        return [(bits, packing)]
    return [(4, four), (bits - 4, four if bits == 8 else packing)][: 1 + (bits > 4)]


def _pack_field(codes: jax.Array, bits: int, layout: str) -> list[jax.Array]:
    """Arrays for uint8 codes in one layout.

    Planes are made in two stages, by way of nibbles: for bytes made of eight parts at once the
    TPU's compiler needs more temporary memory.
    """
    if layout in ("uint4", "uint8"):
        return [codes.astype(layout)]
    if layout == "rows":
        axis, apart, padding = packing_of(codes.shape)
        codes = explicit_sharding.in_whole_runs(codes, axis, 2 * apart)
        codes = jnp.pad(codes, [(0, padding * (a == axis)) for a in range(codes.ndim)])
        runs = explicit_sharding.split_axis(codes, axis, (2, apart))
        halves = [jax.lax.index_in_dim(runs, i, axis + 1, keepdims=False) for i in (0, 1)]
        return [explicit_sharding.merge_axes(_join(halves, 4), axis, 2)]
    codes, axis = _with_eighths(codes)
    nibbles = [codes]
    if bits < 4:
        # Nibble i holds the quarters i, i + bits, ...; of 3 bits also bit i of the last quarter.
        quarters = jnp.split(codes, 4, axis)
        nibbles = [_join(quarters[i : 4 // bits * bits : bits], bits) for i in range(bits)]
        if bits == 3:
            nibbles = [part | (((quarters[3] >> i) & 1) << 3) for i, part in enumerate(nibbles)]
    nibbles = [part.astype(jnp.uint4) for part in nibbles]
    if layout == "nibbles":
        return nibbles
    nibbles = jax.lax.optimization_barrier(nibbles)
    return [_join(jnp.split(part.astype(jnp.uint8), 2, axis), 4) for part in nibbles]


def _unpack_field(parts: Parts, shape: tuple[int, ...], bits: int, layout: str) -> jax.Array:
    """The inverse of `_pack_field`."""
    if layout in ("uint4", "uint8"):
        return parts[0].astype(jnp.uint8)
    if layout == "rows":
        axis, apart, _ = packing_of(shape)
        packed = explicit_sharding.in_whole_runs(parts[0], axis, apart)
        runs = explicit_sharding.split_axis(packed, axis, (apart,))
        codes = jnp.stack([runs & 15, runs >> 4], axis=axis + 1)
        codes = explicit_sharding.merge_axes(codes, axis, 3)
        return jax.lax.slice_in_dim(codes, 0, shape[axis], axis=axis)
    # Packing made the axis smaller that was split.
    same_axes = parts[0].ndim == len(shape)
    split = (a for a, size in enumerate(parts[0].shape) if same_axes and size != shape[a])
    axis = next(split, 0)
    if layout == "planes":
        bytes_ = [jnp.concatenate([part & 15, part >> 4], axis) for part in parts]
        parts = jax.lax.optimization_barrier(tuple(part.astype(jnp.uint4) for part in bytes_))
    nibbles = [part.astype(jnp.uint8) for part in parts]  # no device has arithmetic in 4 bits
    codes = nibbles[0]
    if bits < 4:
        shifts = range(0, 5 - bits, bits)
        quarters = [(part >> shift) & (2**bits - 1) for shift in shifts for part in nibbles]
        if bits == 3:
            quarters.append(_join([part >> 3 for part in nibbles], 1))
        codes = jnp.concatenate(quarters, axis)
    return codes if codes.shape == shape else codes[: math.prod(shape)].reshape(shape)


def _join(fields: list[jax.Array], bits: int) -> jax.Array:
    """Fields of ``bits`` bits in one number, the first lowest."""
    shifted = (field << (bits * i) if i else field for i, field in enumerate(fields))
    return functools.reduce(jnp.bitwise_or, shifted)


def _with_eighths(codes: jax.Array) -> tuple[jax.Array, int]:
    """The codes, flattened and padded if need be, and the axis to split into eighths."""
    partition = explicit_sharding.partition_of(codes)
    order = [*range(codes.ndim - 2, -1, -1), *range(codes.ndim)[-1:]]
    axes = [a for a in order if codes.shape[a] % 8 == 0]
    if axes:
        # The first that is not sharded, or the first.
        axis = min(axes, key=lambda a: partition is not None and partition[a] is not None)
        return explicit_sharding.in_whole_runs(codes, axis, codes.shape[axis]), axis
    if partition is not None:
        codes = explicit_sharding.constrain(codes, PartitionSpec(*[None] * codes.ndim))
    return jnp.pad(codes.reshape(-1), (0, -codes.size % 8)), 0
