"""Adam with its moments in codes, in plain jax.numpy: what every kernel must agree with."""

import jax
import jax.numpy as jnp

from lowrank_optax.kernels.adam import AdamScalars, adam_direction, adam_moments, applied
from lowrank_optax.quantization import BlockFormat, Quantized, dequantize, quantize


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
    m = dequantize(first, formats[0], gradient.shape)
    v = dequantize(second, formats[1], gradient.shape)
    m, v = adam_moments(gradient.astype(jnp.float32), m, v, scalars)
    direction = adam_direction(m, v, scalars)  # before the moments are rounded to codes
    result = direction if param is None else applied(direction, param, scalars)
    return result, quantize(m, formats[0]), quantize(v, formats[1])
