"""Adam in a fixed subspace, in plain jax.numpy: what every kernel must agree with."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.kernels.adam import AdamScalars, adam_direction, adam_moments, applied
from lowrank_optax.matrices.bfloat16 import product_with_bfloat16
from lowrank_optax.matrices.explicit_sharding import partition_of, product
from lowrank_optax.quantization import BlockFormat, dequantize, quantize


def reference(
    gradient: jax.Array,
    basis: jax.Array,
    first: Any,
    second: Any,
    param: jax.Array | None,
    scalars: AdamScalars,
    *,
    axis: int,
    formats: tuple[BlockFormat, BlockFormat] | None,
) -> tuple[jax.Array, Any, Any]:
    """See `lowrank_optax.kernels.projected_adam`."""
    projected = _project(gradient, basis.astype(jnp.float32), axis)
    if formats is not None:
        first = dequantize(first, formats[0], projected.shape)
        second = dequantize(second, formats[1], projected.shape)
    first, second = adam_moments(projected, first, second, scalars)
    direction = adam_direction(first, second, scalars)
    letters = "...mr,...rn->...mn" if axis == -2 else "...nr,...mr->...mn"
    lifted = product(letters, basis.astype(jnp.float32), direction, partition_of(gradient))
    result = lifted if param is None else applied(lifted, param, scalars)
    if formats is None:
        return result, first, second
    return result, quantize(first, formats[0]), quantize(second, formats[1])


def _project(gradient: jax.Array, basis: jax.Array, axis: int) -> jax.Array:
    """``Pᵀ G [*batch, r, n]`` for rows, ``G P [*batch, m, r]`` for columns."""
    partition = partition_of(gradient)
    if partition is not None:
        partition = PartitionSpec(*partition[:-2], partition[-1 if axis == -2 else -2], None)
    multiply = product_with_bfloat16 if gradient.dtype == jnp.bfloat16 else product
    letters = "...mn,...mr->...nr" if axis == -2 else "...mn,...nr->...mr"
    projected = multiply(letters, gradient, basis, partition)
    return projected.mT if axis == -2 else projected
