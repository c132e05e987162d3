"""Adam with its moments in codes as one Triton kernel: whole blocks, a few to a program.

Blocks are rows here: arrays ``[..., n]`` are ``[outer, halves, blocks, block]``, where the halves
are partners of packed 4-bit codes, and codes ``[outer, blocks, block]``. On a GPU that costs
nothing.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
import jax.numpy as jnp

from lowrank_optax.kernels.adam import (
    AdamScalars,
    adam_direction,
    adam_moments,
    applied,
    as_float32,
    in_place,
    reason_against_formats,
    result_like,
)
from lowrank_optax.quantization import (
    BlockFormat,
    Quantized,
    decode_blocks,
    encode_blocks,
    layout_of,
    packing_of,
)

ELEMENTS = 2048  # to a program: 16 for each thread of four warps


class Blocks(NamedTuple):
    """The shape ``[outer, halves, inner, block]`` of an array in the kernel."""

    outer: int
    halves: int
    inner: int
    block: int


def supports(
    gradient: Any,
    first: Quantized,
    second: Quantized,
    param: Any,
    scalars: AdamScalars,
    *,
    formats: tuple[BlockFormat, BlockFormat],
) -> str | None:
    """Why the kernel does not support these arguments, or None."""
    del first, second, scalars
    for x in (gradient,) if param is None else (gradient, param):
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"{x.dtype} is not a float of 32 or 16 bits"
    reason = reason_against_formats(formats)
    if reason is not None:
        return reason
    block, shape = formats[0].block_size, gradient.shape
    if block & (block - 1) or block < 16:
        return f"a block of {block} is no power of two of at least 16"
    if not gradient.size or shape[-1] % block:
        return f"the last axis of {shape} is no multiple of the block, {block}"
    if formats[0].map.bits == 4 and (len(shape) == 1 or packing_of(shape).padding):
        return f"4-bit codes of {shape} are packed in a single axis, or an odd one"
    return None


def blocks_of(shape: tuple[int, ...], fmt: BlockFormat) -> Blocks:
    """How the kernel sees an array of this shape."""
    blocks = layout_of(shape, fmt.block_size).blocks
    if fmt.map.bits == 8:
        return Blocks(1, 1, math.prod(shape[:-1]) * blocks, fmt.block_size)
    axis, apart, _ = packing_of(shape)
    outer = math.prod(shape[:axis]) * (shape[axis] // (2 * apart))
    return Blocks(outer, 2, apart * math.prod(shape[axis + 1 : -1]) * blocks, fmt.block_size)


def run(
    gradient: jax.Array,
    first: Quantized,
    second: Quantized,
    param: jax.Array | None,
    scalars: AdamScalars,
    *,
    formats: tuple[BlockFormat, BlockFormat],
    interpret: Any = False,
) -> tuple[jax.Array, Quantized, Quantized]:
    """See `lowrank_optax.kernels.low_bit_adam`, for arguments that `supports` accepts."""
    view = blocks_of(gradient.shape, formats[0])
    values = [x.reshape(view) for x in (gradient, param) if x is not None]
    states = [
        x
        for q in (first, second)
        for x in (q.codes.reshape(view.outer, view.inner, view.block), q.scales.reshape(view[:3]))
    ]
    # As many blocks to a program as divide theirs: then no tile is ragged.
    count = math.gcd(view.inner, max(1, ELEMENTS // (view.halves * view.block)))
    full = pl.BlockSpec((None, view.halves, count, view.block), lambda o, i: (o, 0, i, 0))
    codes = pl.BlockSpec((None, count, view.block), lambda o, i: (o, i, 0))
    scales = pl.BlockSpec((None, view.halves, count), lambda o, i: (o, 0, i))
    result = result_like(values[0], jnp.float32 if param is None else param.dtype)
    new, *states = pl.pallas_call(
        functools.partial(_kernel, formats=formats),
        grid=(view.outer, view.inner // count),
        in_specs=[
            pl.BlockSpec((len(scalars),), lambda o, i: (0,)),
            *[full] * len(values),
            *[codes, scales] * 2,
        ],
        out_specs=[full, *[codes, scales] * 2],
        out_shape=[result, *(result_like(x) for x in states)],
        input_output_aliases=in_place(values, result, states),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=f"low_bit_adam_{formats[0].map.bits}",
    )(jnp.stack(as_float32(scalars)), *values, *states)
    shapes = [x.shape for q in (first, second) for x in q]
    states = [x.reshape(shape) for x, shape in zip(states, shapes, strict=True)]
    return new.reshape(gradient.shape), Quantized(*states[:2]), Quantized(*states[2:])


def _kernel(scalars_ref: Any, *refs: Any, formats: tuple[BlockFormat, BlockFormat]) -> None:
    values, old_refs, (new, *new_refs) = refs[: len(refs) - 9], refs[-9:-5], refs[-5:]
    s = AdamScalars(*(scalars_ref[i] for i in range(len(AdamScalars._fields))))
    halves = values[0].shape[0]
    words = [old_refs[2 * k][...].astype(jnp.int32) for k in range(2)]
    packed: list[jax.Array] = [jnp.zeros_like(word) for word in words]
    for h in range(halves):
        codes = [word if halves == 1 else (word >> 4 * h) & 15 for word in words]
        first, second = [
            decode_blocks(codes[k], old_refs[2 * k + 1][h][:, None], f)
            for k, f in enumerate(formats)
        ]
        moments = adam_moments(values[0][h].astype(jnp.float32), first, second, s)
        direction = adam_direction(*moments, s)
        new[h] = direction if len(values) == 1 else applied(direction, values[1][h], s)
        for k, f in enumerate(formats):
            finite = jnp.where(jnp.isfinite(moments[k]), moments[k], 0)
            scale = jnp.max(jnp.abs(finite), axis=-1)
            new_refs[2 * k + 1][h] = scale
            packed[k] = packed[k] | (encode_blocks(finite, scale[:, None], f) << 4 * h)
    for k in range(2):
        new_refs[2 * k][...] = packed[k].astype(jnp.uint8)
