"""Adam with its moments in codes, in plain jax.numpy: what every kernel must agree with."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.kernels.adam import AdamScalars, adam_direction, adam_moments, applied
from lowrank_optax.quantization import BlockFormat, Quantized, dequantize, quantize
from lowrank_optax.quantization.blocks import same_layout
from lowrank_optax.slices.loop import Cut, run
from lowrank_optax.slices.plan import cut_of


def reference(
    gradient: jax.Array,
    first: Quantized,
    second: Quantized,
    param: jax.Array | None,
    scalars: AdamScalars,
    *,
    formats: tuple[BlockFormat, BlockFormat],
) -> tuple[jax.Array, Quantized, Quantized]:
    """See `lowrank_optax.kernels.low_bit_adam`."""

    def step(carried: Any, gradient: jax.Array, row: Any) -> Any:
        param, first, second = carried
        m = dequantize(first, formats[0], gradient.shape)
        v = dequantize(second, formats[1], gradient.shape)
        m, v = adam_moments(gradient.astype(jnp.float32), m, v, scalars)
        direction = adam_direction(m, v, scalars)  # before the moments are rounded to codes
        result = direction if param is None else applied(direction, param, scalars)
        return result, quantize(m, formats[0]), quantize(v, formats[1])

    carried = param, first, second
    cut = None if param is None else cut_of([gradient, param])
    if cut is None or not _in_own_blocks(gradient.shape, cut, formats):
        return step(carried, gradient, None)
    return run(step, carried, gradient, cut)


def _in_own_blocks(
    shape: tuple[int, ...], cut: Cut, formats: tuple[BlockFormat, BlockFormat]
) -> bool:
    """Whether slices are made of whole blocks, so that codes and scales can be cut as they are."""
    parts = [(rows // cut.shards, *shape[1:]) for rows in (cut.rows, cut.rest) if rows]
    return all(same_layout(shape, part, fmt) for part in parts for fmt in formats)
