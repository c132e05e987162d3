"""One function for attention, whose implementation is chosen by name, or by length and backend."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import jax

from lowrank_optax.compat import splash_attention
from lowrank_optax.layers.attention.attention_arguments import (
    CONTEXT,
    Window,
    check_arguments,
    name_context,
)
from lowrank_optax.layers.attention.chunked import chunked_attention

AttentionImplementation = Literal["xla", "chunked", "splash", "cudnn", "tokamax"]

# Pairs of a query and a key up to which the plain form is the default.
PLAIN_PAIRS = 256 * 256


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: Window = None,
    implementation: AttentionImplementation | None = None,
) -> jax.Array:
    """Compute attention as ``jax.nn.dot_product_attention`` does, by any implementation.

    - ``"xla"``: that of ``jax.nn``, with all scores ``[B, N, T, S]`` in memory;
    - ``"chunked"``: `chunked_attention`, for every backend, dtype and sharding;
    - ``"splash"``: JAX's Pallas kernel for TPUs, for lengths ``T = S`` that are multiples of 128,
      on bfloat16 or float32 arrays that lie on one device (or inside ``jax.shard_map``), without a
      mask;
    - ``"cudnn"``: cuDNN's kernel for Nvidia GPUs, by way of ``jax.nn``;
    - ``"tokamax"``: ``tokamax.dot_product_attention``, if that package is installed.

    By default it is ``"xla"`` if ``T S`` is at most 256 × 256; for more pairs ``"splash"`` where
    JAX has one device, a TPU, the kernel supports the arguments, and ``H`` is a multiple of 128, to
    which the kernel pads it; and ``"chunked"`` otherwise. The output is named
    ``attention_context`` for policies of ``jax.checkpoint``.

    Args:
      query: Queries ``[B, T, N, H]``.
      key: Keys ``[B, S, K, H]``; each group of ``N / K`` heads of the query shares one.
      value: Values ``[B, S, K, H]``.
      mask: Booleans that broadcast to ``[B, N, T, S]``: whether a query sees a key.
      scale: Factor of the scores, not traced; ``1 / sqrt(H)`` by default.
      is_causal: Whether query ``i`` sees only keys up to ``i``.
      local_window_size: How many keys before and after its own position a query sees, as a pair or
        as one number for both.
      implementation: Name of the implementation, or None for the default.

    Returns:
      The output ``[B, T, N, H]`` in the query's dtype. Where a query sees no key, it depends on the
      implementation: ``"xla"`` has the mean of all values, ``"chunked"`` 0.

    Raises:
      ValueError: If there is no such implementation, or shapes or dtypes do not fit.
      NotImplementedError: If the implementation cannot run here; the sentence says what is missing.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 300, 2, 16))
      >>> out = lro.layers.dot_product_attention(q, k, v, is_causal=True)
      >>> plain = lro.layers.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
      >>> print(out.shape, bool(jnp.allclose(out, plain, atol=1e-5)))
      (1, 300, 2, 16) True

    Reference:
      Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, equation 1.
    """
    window = check_arguments(query, key, value, mask, local_window_size, scale)
    check_implementation(implementation, "implementation")
    if implementation is None:
        implementation = default_implementation(query, key, mask)
    if reason := _reason_against(implementation, query, key, mask):
        raise NotImplementedError(f"implementation={implementation!r} cannot run: {reason}.")
    options: dict[str, Any] = {
        "scale": scale,
        "is_causal": is_causal,
        "local_window_size": window,
    }
    if implementation == "chunked":
        return chunked_attention(query, key, value, mask, **options)
    if implementation == "splash":
        return splash_attention.attention(query, key, value, name=CONTEXT, **options)
    attention = jax.nn.dot_product_attention
    if implementation == "tokamax":
        attention = import_module("tokamax").dot_product_attention
    else:
        options["implementation"] = implementation
    return name_context(attention(query, key, value, mask=mask, **options), 2)


def check_implementation(implementation: Any, argument: str) -> None:
    """Raise ValueError unless this is None or the name of an implementation."""
    if implementation not in (None, *get_args(AttentionImplementation)):
        names = ", ".join(map(repr, get_args(AttentionImplementation)))
        raise ValueError(f"{argument}={implementation!r} must be None or one of {names}.")


def default_implementation(
    query: jax.Array, key: jax.Array, mask: jax.Array | None
) -> AttentionImplementation:
    """Choose by the number of pairs and JAX's default backend; see `dot_product_attention`."""
    if query.shape[1] * key.shape[1] <= PLAIN_PAIRS:
        return "xla"
    if jax.device_count() == 1 and query.shape[3] % 128 == 0:
        return "chunked" if _reason_against("splash", query, key, mask) else "splash"
    return "chunked"


def _reason_against(
    implementation: AttentionImplementation, query: jax.Array, key: jax.Array, mask: Any
) -> str | None:
    """What is missing for an implementation; None if it can run."""
    backend = jax.default_backend()
    if implementation == "cudnn" and backend != "gpu":
        return f"it needs an Nvidia GPU with cuDNN, and JAX's default backend is {backend!r}"
    if implementation == "tokamax" and find_spec("tokamax") is None:
        return "the package tokamax is not installed (pip install tokamax)"
    if implementation != "splash":
        return None
    if backend != "tpu":
        return f"it needs a TPU, and JAX's default backend is {backend!r}"
    if mask is not None:
        return "it takes no mask, only is_causal and local_window_size"
    return splash_attention.reason_against(query, key)
