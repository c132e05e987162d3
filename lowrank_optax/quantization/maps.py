"""Code maps: the numbers in ``[-1, 1]`` that codes of 8 or 4 bits stand for.

Both directions are closed forms of sums, products and comparisons, which run as they are in a
Pallas kernel too: a table of 256 entries, indexed for each element, costs an accelerator thousands
of times the traffic of the codes.
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

MapName = Literal["dynamic", "linear", "log", "fp8", "nf4"]
Bits = Literal[8, 4]
Coder = Callable[[jax.Array], jax.Array]

FLOAT8_MAX = 448.0  # the largest float8_e4m3fn
LOG_DECADES = {8: 7.0, 4: 3.0}

# Quantiles of a normal distribution, zero and both ends among them, over the largest.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


@dataclasses.dataclass(frozen=True)
class CodeMap:
    """A set of numbers and the codes that stand for them, in ascending order from zero on.

    Attributes:
      name: Which of the maps.
      bits: Bits of a code: 8 or 4.
      signed: Whether the numbers lie in ``[-1, 1]``, or in ``[0, 1]``.
      encode: ``encode(x)``: int32 codes of the numbers nearest to float32 ``x`` of that range.
      decode: ``decode(codes)``: the float32 numbers of int32 codes.
      least_positive: Code of the smallest number above zero.
      largest: Code of one.
    """

    name: MapName
    bits: Bits
    signed: bool
    encode: Coder
    decode: Coder
    least_positive: int
    largest: int


@functools.cache
def code_map(name: MapName = "dynamic", bits: Bits = 8, signed: bool = True) -> CodeMap:
    r"""A code map by its name.

    - ``"dynamic"``: ``bits - 1`` decades, the ``i``-th from below with :math:`2^i` (signed) or
      :math:`2^{i+1}` (unsigned) evenly spaced numbers; and zero and one. The smaller a number, the
      larger its relative error.
    - ``"linear"``: evenly spaced. Unsigned without zero, :math:`k / 2^b`.
    - ``"log"``: evenly spaced logarithms over seven decades in 8 bits and three in 4, so that the
      relative error is the same everywhere. Unsigned without zero.
    - ``"fp8"``: the numbers of ``float8_e4m3fn`` over the largest of them. 8 bits only.
    - ``"nf4"``: NormalFloat, quantiles of a normal distribution, for weights. 4 bits, signed only.

    Raises:
      ValueError: If there is no such map, or none of so many bits.

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
      https://arxiv.org/abs/2110.02861, section 2. Li et al., Memory Efficient Optimizers with 4-bit
      States, 2023, https://arxiv.org/abs/2309.01507, section 4. Dettmers et al., QLoRA, 2023,
    https://arxiv.org/abs/2305.14314, section 3.
    """
    if name not in get_args(MapName):
        raise ValueError(f"map={name!r} must be one of {', '.join(get_args(MapName))}.")
    if bits not in get_args(Bits):
        raise ValueError(f"bits={bits!r} must be 8 or 4.")
    if name == "fp8" and bits != 8:
        raise ValueError("map='fp8' has 8 bits: for bits=4 take another map.")
    if name == "nf4" and not (bits == 4 and signed):
        raise ValueError("map='nf4' has 4 bits and numbers of either sign: take another map.")
    makers = {"dynamic": _dynamic, "linear": _linear, "log": _log, "fp8": _float8, "nf4": _nf4}
    make = makers[name]
    return CodeMap(name, bits, signed, *make(bits, signed))


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
        place = jnp.clip(jnp.floor((scaled - 0.1) * (bins / 0.9)), 0, bins - 1)
        a = jnp.where(size < borders[0], 0.0 if signed else 1.0, bins + place)
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


def _linear(bits: int, signed: bool) -> tuple[Coder, Coder, int, int]:
    levels = 2 ** (bits - 1) - 1 if signed else 2**bits
    zero = levels if signed else -1

    def encode(x: jax.Array) -> jax.Array:
        k = jnp.floor(x * levels + 0.5).astype(jnp.int32)  # a kernel may lack round
        return zero + (k if signed else jnp.maximum(k, 1))

    def decode(codes: jax.Array) -> jax.Array:
        return (codes - zero).astype(jnp.float32) / levels

    return encode, decode, zero + 1, zero + levels


def _log(bits: int, signed: bool) -> tuple[Coder, Coder, int, int]:
    levels = 2 ** (bits - 1) - 1 if signed else 2**bits
    zero = levels if signed else -1
    step = LOG_DECADES[bits] * math.log(10) / (levels - 1)  # between neighbours' logarithms
    # In numbers, not in logarithms, the middle between neighbours is above their mean.
    middle = math.log((1 + math.exp(step)) / 2) / step
    least = math.exp(-step * (levels - 1))

    def encode(x: jax.Array) -> jax.Array:
        size = jnp.abs(x)
        place = levels + jnp.log(jnp.maximum(size, least)) / step
        k = jnp.clip(jnp.floor(place + 1 - middle), 1, levels)
        if not signed:
            return (zero + k).astype(jnp.int32)
        k = jnp.where(size < least / 2, 0, k)
        return (zero + jnp.where(x < 0, -k, k)).astype(jnp.int32)

    def decode(codes: jax.Array) -> jax.Array:
        d = (codes - zero).astype(jnp.float32)
        size = jnp.exp((jnp.abs(d) - levels) * step)
        return jnp.where(d == 0, 0.0, jnp.where(d < 0, -size, size))

    return encode, decode, zero + 1, zero + levels


def _float8(bits: int, signed: bool) -> tuple[Coder, Coder, int, int]:
    del bits, signed

    def encode(x: jax.Array) -> jax.Array:
        narrow = (x * FLOAT8_MAX).astype(jnp.float8_e4m3fn)
        return jax.lax.bitcast_convert_type(narrow, jnp.uint8).astype(jnp.int32)

    def decode(codes: jax.Array) -> jax.Array:
        narrow = jax.lax.bitcast_convert_type(codes.astype(jnp.uint8), jnp.float8_e4m3fn)
        return narrow.astype(jnp.float32) / FLOAT8_MAX

    return encode, decode, 1, 0x7E


def _nf4(bits: int, signed: bool) -> tuple[Coder, Coder, int, int]:
    del bits, signed

    def encode(x: jax.Array) -> jax.Array:
        codes = jnp.zeros(x.shape, jnp.int32)
        for low, high in itertools.pairwise(NF4_LEVELS):
            codes += (x > (low + high) / 2).astype(jnp.int32)
        return codes

    def decode(codes: jax.Array) -> jax.Array:
        levels = jnp.full(codes.shape, NF4_LEVELS[0], jnp.float32)
        for code, level in enumerate(NF4_LEVELS[1:], start=1):
            levels = jnp.where(codes >= code, level, levels)
        return levels

    return encode, decode, NF4_LEVELS.index(0.0) + 1, len(NF4_LEVELS) - 1
