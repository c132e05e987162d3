"""Code maps: the numbers that codes of 1 to 8 bits stand for, by a formula or a table.

Both directions are sums, products and comparisons, which run as they are in a Pallas kernel too: a
table of 256 entries, indexed for each element, costs an accelerator thousands of times the traffic
of the codes.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

MapName = Literal["dynamic", "linear", "affine", "normal", "nf4"]
Bits = Literal[8, 4]
Coder = Callable[[jax.Array], jax.Array]

# Quantiles of a normal distribution, zero and both ends among them, over the largest.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
# By bits, the positive halves of the levels of least squared error for blocks of 64 numbers of a
# normal distribution, each over the largest size in its block.
NORMAL_LEVELS = {
    1: (0.313271,),
    2: (0.178326, 0.602461),
    3: (0.094453, 0.29191, 0.52056, 0.832718),
    4: (0.047389, 0.143184, 0.242185, 0.347086, 0.461575, 0.591395, 0.74686, 0.950611),
}
_BITS = {"dynamic": (8, 4), "linear": range(2, 9), "affine": (8, 4), "normal": range(1, 5)}
_BITS |= {"nf4": (4,)}


@dataclasses.dataclass(frozen=True)
class CodeMap:
    """A set of numbers and the codes that stand for them, in ascending order.

    Attributes:
      name: Name of the map.
      bits: Bits of a code, 1 to 8.
      signed: Whether the numbers lie in ``[-1, 1]``, or in ``[0, 1]``.
      encode: ``encode(x)``: int32 codes of the numbers nearest to float32 ``x`` of that range.
      decode: ``decode(codes)``: the float32 numbers of int32 codes.
      least_positive: Code of the smallest number above zero.
      largest: Largest code.
      has_zero_point: Whether codes are counted from a block's own code of zero. The numbers are
        then whole.
    """

    name: MapName
    bits: int
    signed: bool
    encode: Coder
    decode: Coder
    least_positive: int
    largest: int
    has_zero_point: bool = False


@functools.cache
def code_map(name: MapName = "dynamic", bits: int = 8, signed: bool = True) -> CodeMap:
    r"""A code map by its name.

    - ``"dynamic"``, for moments, 8 or 4 bits: ``bits - 1`` decades, the ``i``-th from below with
      :math:`2^i` (signed) or :math:`2^{i+1}` (unsigned) evenly spaced numbers; and zero and one.
      The smaller a number, the larger its relative error.
    - ``"normal"``, for residuals, 1 to 4 bits: the levels of least squared error for blocks of 64
      normally distributed numbers.
    - ``"linear"``, for residuals, 2 to 8 bits: evenly spaced, zero among them.
    - ``"nf4"``, for weights, 4 bits: NormalFloat, quantiles of a normal distribution.
    - ``"affine"``, for weights and bases, 8 or 4 bits: whole numbers, counted from a block's own
      code of zero; see `quantize`.

    Raises:
      ValueError: If there is no such map, or not with these bits or this sign.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from lowrank_optax.quantization import code_map
      >>> four = code_map("dynamic", bits=4)
      >>> print(np.asarray(four.decode(jnp.arange(8, 16))).round(4))
      [0.0055 0.0325 0.0775 0.2125 0.4375 0.6625 0.8875 1.    ]
      >>> four.encode(jnp.array([-0.5, 0.0, 0.03, 1.0])).tolist()
      [2, 7, 9, 15]

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021,
      https://arxiv.org/abs/2110.02861, section 2. Dettmers et al., QLoRA, 2023,
      https://arxiv.org/abs/2305.14314, section 3.
    """
    if name not in get_args(MapName):
        raise ValueError(f"map={name!r} must be one of {', '.join(get_args(MapName))}.")
    if bits not in _BITS[name]:
        raise ValueError(
            f"bits={bits!r} must be one of {', '.join(map(str, _BITS[name]))} for map={name!r}."
        )
    if not signed and name != "dynamic":
        raise ValueError(f"map={name!r} has numbers of either sign: take map='dynamic'.")
    half = 2 ** (bits - 1)
    if name == "dynamic":
        return CodeMap(name, bits, signed, *_dynamic(bits, signed))
    if name == "linear":
        top = half - 1
        encode = lambda x: (jnp.clip(jnp.round(x * top), -top, top) + top).astype(jnp.int32)

        def decode(codes: jax.Array) -> jax.Array:
            x = (codes - top).astype(jnp.float32)
            # Compilers multiply by 1 / top, which is rounded: the ends would not be -1 and 1.
            return jnp.where(jnp.abs(x) == top, jnp.sign(x), x / top)

        return CodeMap(name, bits, True, encode, decode, half, 2 * top)
    if name == "affine":
        encode = lambda x: jnp.round(x).astype(jnp.int32)
        decode = lambda codes: codes.astype(jnp.float32)
        return CodeMap(name, bits, True, encode, decode, 1, 2 * half - 1, has_zero_point=True)
    if name == "nf4":
        levels = NF4_LEVELS
    else:
        positive = NORMAL_LEVELS[bits]
        levels = (*(-level for level in reversed(positive)), *positive)
    middles = [(low + high) / 2 for low, high in itertools.pairwise(levels)]
    encode = functools.partial(count_steps, middles, range(len(levels)))
    decode = functools.partial(select_levels, levels)
    least = next(code for code, level in enumerate(levels) if level > 0)
    return CodeMap(name, bits, True, encode, decode, least, len(levels) - 1)


def count_steps(boundaries: Sequence[float], codes: Sequence[int], x: jax.Array) -> jax.Array:
    """int32: ``codes[i]`` where i of the ascending boundaries are below ``x``."""
    code = jnp.full(x.shape, codes[0], jnp.int32)
    for boundary, (below, above) in zip(boundaries, itertools.pairwise(codes), strict=True):
        code += jnp.where(x > boundary, above - below, 0)
    return code


def select_levels(levels: Sequence[float], codes: jax.Array) -> jax.Array:
    """float32: ``levels[codes]`` of int32 codes, by selections."""
    values = [jnp.float32(level) for level in levels]
    bit = 1
    while len(values) > 1:  # a binary tree: the lowest bit says which of each two
        odd = (codes & bit) != 0
        pairs = itertools.zip_longest(values[::2], values[1::2])
        values = [low if high is None else jnp.where(odd, high, low) for low, high in pairs]
        bit *= 2
    return jnp.broadcast_to(values[0], codes.shape)


def _dynamic(bits: int, signed: bool) -> tuple[Coder, Coder, int, int]:
    decades = bits - 1
    zero = 2**decades - 1 if signed else 0
    # Codes of one sign, counted so that the highest set bit of ``a`` tells the decade.
    offset = zero if signed else -1
    first = 0 if signed else 1  # the highest bit of the smallest decade

    def count(i: int) -> int:
        return 2 ** (i + first)

    # Above these, numbers are nearer to the i-th decade than to what is below it.
    borders = [0.275 * 10.0 ** (1 - decades)] if signed else [0.1625 * 10.0 ** (1 - decades)]
    borders += [10.0 ** (i - decades + 1) * (0.1 + 0.18 / count(i)) for i in range(1, decades)]
    one = 1 - 0.225 / count(decades - 1)  # above it, numbers are nearer to one

    def encode(x: jax.Array) -> jax.Array:
        size = jnp.abs(x)
        scaled, bins = size * 10.0 ** (decades - 1), jnp.full_like(size, count(0))
        for i in range(1, decades):
            above = size >= borders[i]
            scaled = jnp.where(above, size * 10.0 ** (decades - 1 - i), scaled)
            bins = jnp.where(above, float(count(i)), bins)
        bin_ = jnp.clip(jnp.floor((scaled - 0.1) * (bins / 0.9)), 0, bins - 1)
        a = jnp.where(size < borders[0], 0.0 if signed else 1.0, bins + bin_)
        a = jnp.where((x if signed else size) >= one, float(2 * count(decades - 1)), a)
        return jnp.where(x < 0, zero - a, offset + a).astype(jnp.int32)

    def decode(codes: jax.Array) -> jax.Array:
        d = codes - offset
        a = jnp.abs(d).astype(jnp.float32)
        raw = jax.lax.bitcast_convert_type(a, jnp.int32)
        exponent = (raw >> 23) - 127  # of two: the highest set bit of a
        fraction = jax.lax.bitcast_convert_type((raw & 0x7FFFFF) | (127 << 23), jnp.float32) - 1
        half_bin = jax.lax.bitcast_convert_type((126 - exponent) << 23, jnp.float32)
        unit = jnp.full_like(a, 10.0 ** (1 - decades))
        for i in range(1, decades):
            unit = jnp.where(exponent >= i + first, 10.0 ** (i - decades + 1), unit)
        size = unit * (0.1 + 0.9 * (fraction + half_bin))
        size = jnp.where(a >= 2 * count(decades - 1), 1.0, size)
        size = jnp.where(a < count(0), 0.0, size)
        return jnp.where(d < 0, -size, size)

    return encode, decode, zero + 1, 2**bits - 1
