"""Affine quantization: ``scale · (code - zero)``, evenly spaced between a group's extremes."""

import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.matrices.draws import drawn, split
from lowrank_optax.quantization.blocks import over_blocks
from lowrank_optax.quantization.packing import pack, unpack

GROUP_SIZE = 256


class Affine(NamedTuple):
    """An array in codes with a scale and a zero for each group of elements.

    Attributes:
      codes: uint8 in the shape of the array; of 4 bits two to a byte, as `pack` has them.
      scales: float32 ``[*leading, groups]``.
      zeros: uint8 ``[*leading, groups]``: the code of zero.
    """

    codes: Any
    scales: Any
    zeros: Any


def affine_quantize(
    x: jax.Array, bits: Literal[8, 4] = 8, group_size: int = GROUP_SIZE, key: Any = None
) -> Affine:
    r"""Codes of a float array, between the extremes of each group, of which zero is always inside.

    :math:`s = (\max - \min) / (2^b - 1)`, :math:`z = -\mathrm{round}(\min / s)`,
    :math:`c = \mathrm{round}(x / s) + z`. Groups lie as blocks do: along the last axis, or over
    as many last axes as it takes to fill one.

    Args:
      x: Any float array of at least one axis.
      bits: 8 or 4.
      group_size: Elements to a group.
      key: If given, a key or one for each row, ``x / s`` is rounded up or down at random, with
        itself as expectation. The group is then cut into one step less, and :math:`z` rounded up,
        so that there is a code beyond either extreme: clipped, they would be biased towards zero.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from lowrank_optax.quantization import affine_dequantize, affine_quantize
      >>> x = jnp.array([-0.5, 0.0, 0.25, 1.0])
      >>> q = affine_quantize(x, bits=4)
      >>> print(q.zeros, np.asarray(affine_dequantize(q, x.shape, bits=4)).round(2))
      [5] [-0.5  0.   0.2  1. ]

    Reference:
      Zhang et al., Q-GaLore, 2024, https://arxiv.org/abs/2407.08296, section 3.2.
    """
    top = 2**bits - 1
    steps = top if key is None else top - 1
    keys = itertools.repeat(None) if key is None else iter(split(key))

    def encode(groups: jax.Array) -> tuple[jax.Array, ...]:
        groups = jnp.where(jnp.isfinite(groups), groups, 0)
        low = jnp.minimum(jnp.min(groups, axis=-1, keepdims=True), 0)
        high = jnp.maximum(jnp.max(groups, axis=-1, keepdims=True), 0)
        scales = high / steps - low / steps
        usable = scales >= jnp.finfo(jnp.float32).tiny
        safe = jnp.where(usable, scales, 1)
        lowest = jnp.where(usable, low, 0) / safe
        zeros = jnp.clip(-(jnp.round(lowest) if key is None else jnp.floor(lowest)), 0, top)
        codes = _rounded(jnp.where(usable, groups, 0) / safe, next(keys)) + zeros
        codes = jnp.clip(codes, 0, top).astype(jnp.uint8)
        return codes, jnp.squeeze(scales, -1), jnp.squeeze(zeros, -1)

    codes, scales, zeros = over_blocks(encode, x.shape, group_size, [x.astype(jnp.float32)])
    return Affine(*pack(codes, bits, "rows"), scales, zeros.astype(jnp.uint8))


def affine_dequantize(
    quantized: Affine,
    shape: tuple[int, ...],
    bits: Literal[8, 4] = 8,
    group_size: int = GROUP_SIZE,
) -> jax.Array:
    """The float32 array of this shape that codes, scales and zeros stand for."""
    codes = unpack((quantized.codes,), shape, bits, "rows")

    def decode(codes: jax.Array, scales: jax.Array, zeros: jax.Array) -> tuple[jax.Array]:
        steps = codes.astype(jnp.float32) - zeros[..., None].astype(jnp.float32)
        return (scales[..., None] * steps,)

    of_groups = [quantized.scales, quantized.zeros]
    return over_blocks(decode, shape, group_size, [codes], of_groups)[0]


def _rounded(x: jax.Array, key: jax.Array | None) -> jax.Array:
    return jnp.round(x) if key is None else jnp.floor(x + drawn(jax.random.uniform, key, x.shape))
