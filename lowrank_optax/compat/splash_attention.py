"""JAX's experimental Pallas kernel for attention on TPUs."""

from typing import Any

import jax
import jax.numpy as jnp

# Sides of a block of scores, the best first; the kernel takes multiples of 128.
BLOCKS = (512, 256, 128)


def reason_against(query: jax.Array, key: jax.Array) -> str | None:
    """What this kernel, or this version of JAX, lacks for these arrays; None if nothing."""
    length = query.shape[1]
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"its arrays must be bfloat16 or float32, and are {query.dtype}"
    if key.shape[1] != length or length % BLOCKS[-1]:
        return (
            f"its lengths must be equal and multiples of {BLOCKS[-1]}, and are {length} of "
            f"queries and {key.shape[1]} of keys"
        )
    try:
        _modules()
    except ImportError as error:
        return f"jax {jax.__version__} does not have its splash attention ({error})"
    return None


def _modules() -> tuple[Any, Any]:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    return splash_attention_kernel, splash_attention_mask


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None,
    is_causal: bool,
    local_window_size: tuple[int, int] | None,
    name: str,
    interpret: bool = False,
) -> jax.Array:
    """Runs the kernel on ``[B, T, N, H]`` and ``[B, T, K, H]``.

    Args:
      query: Queries.
      key: Keys.
      value: Values.
      scale: Factor of the scores, ``1 / sqrt(H)`` if None.
      is_causal: Whether a query sees no later keys.
      local_window_size: How many keys before and after its own a query sees; None for all.
      name: Name of what is saved for the backward pass, as by ``checkpoint_name``.
      interpret: Runs it without a TPU.
    """
    kernels, masks = _modules()
    length, heads, width = query.shape[1:]
    if local_window_size is not None:
        before, after = local_window_size
        mask = masks.LocalMask((length, length), (before, 0 if is_causal else after), 0)
    elif is_causal:
        mask = masks.CausalMask((length, length))
    else:
        mask = masks.FullMask((length, length))
    side = next(block for block in BLOCKS if length % block == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(**{f"block_{name}": side for name in names}),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=name,
        interpret=interpret,
    )
    scale = width**-0.5 if scale is None else scale
    scaled = (scale * query.astype(jnp.float32)).astype(query.dtype)
    heads_first = (x.swapaxes(1, 2) for x in (scaled, key, value))
    return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)
