"""How the factors of adapters start."""

from typing import Any

import jax
from jax.nn import initializers
import jax.numpy as jnp
from jax.typing import DTypeLike


def kaiming_uniform(gain_squared: float = 1 / 3) -> initializers.Initializer:
    """U(-b, b) with ``b² = 3 gain_squared / fan_in``, for ``[*batch, fan_in, fan_out]``.

    The default is PyTorch's ``kaiming_uniform_`` with ``a = sqrt(5)``: ``b = 1 / sqrt(fan_in)``,
    LoRA's and PEFT's; 2 is ``a = 0``, He's, which Flax and AFLoRA take: ``b = sqrt(6 / fan_in)``.
    """
    return initializers.variance_scaling(
        gain_squared, "fan_in", "uniform", in_axis=-2, out_axis=-1, batch_axis=()
    )


def for_each(
    initialiser: Any, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    """An array ``[L, ...]`` whose layers are drawn with keys of their own."""
    keys = jax.random.split(key, shape[0])
    return jax.vmap(lambda k: initialiser(k, shape[1:], jnp.dtype(dtype)))(keys)
