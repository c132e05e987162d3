"""Causal self-attention: rotary positions, grouped heads, sliding windows, random features."""

from typing import Any, Literal, NamedTuple, TypeAlias

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.layers.attention.implementations import (
    AttentionImplementation,
    check_implementation,
    dot_product_attention,
)
from lowrank_optax.layers.comrope.commuting_rotations import rope_angles
from lowrank_optax.layers.comrope.comrope_layer import ComRoPE
from lowrank_optax.layers.random_features.feature_attention import (
    decode_random_features,
    random_feature_attention,
)
from lowrank_optax.layers.random_features.feature_maps import RandomFeatures
from lowrank_optax.layers.random_features.linear_attention import LinearAttentionState
from lowrank_optax.models.decoder_config import DecoderConfig
from lowrank_optax.models.rotary import rotate


class RMSNorm(nnx.RMSNorm):
    """`nnx.RMSNorm` with Hugging Face's roundings.

    The statistics and the division are float32; the result is cast to the input's dtype before
    it is multiplied by the scale.
    """

    def __call__(self, x: jax.Array, mask: None = None) -> jax.Array:
        """Normalises the last axis; shape and dtype stay."""
        assert self.scale is not None  # use_scale is never False here
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normalised = (x32 * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        return normalised * self.scale[...].astype(x.dtype)


class KeyValueCache(NamedTuple):
    """The keys and values of the positions seen so far.

    Attributes:
        keys: [batch, positions, key_value_heads, head_dim], rotated; zeros where nothing is yet.
        values: the same shape.
    """

    keys: jax.Array
    values: jax.Array

    def write(
        self, keys: jax.Array, values: jax.Array, position: jax.Array | int
    ) -> "KeyValueCache":
        """The cache with the keys and values of the positions from `position` on replaced."""
        start = (0, position, 0, 0)
        return KeyValueCache(
            jax.lax.dynamic_update_slice(self.keys, keys.astype(self.keys.dtype), start),
            jax.lax.dynamic_update_slice(self.values, values.astype(self.values.dtype), start),
        )


Positions = Literal["rope", "comrope"]

Cache: TypeAlias = KeyValueCache | LinearAttentionState
"""What is kept of earlier positions: all keys and values, or the sums of random features."""


def features_of(
    attention: str | RandomFeatures, config: DecoderConfig, implementation: Any
) -> RandomFeatures | None:
    """The random features that a decoder's `attention` means; None for softmax.

    Raises:
        ValueError: there is no such attention, or it has no windows or implementations.
    """
    if attention == "softmax":
        return None
    features = RandomFeatures() if attention == "random-features" else attention
    if not isinstance(features, RandomFeatures):
        raise ValueError(
            f"attention must be 'softmax', 'random-features' or a RandomFeatures, got {attention!r}"
        )
    for name, value in (
        ("sliding_window", config.sliding_window),
        ("attention_implementation", implementation),
    ):
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is for softmax attention: leave it or attention out"
            )
    return features


def comrope_like_rope(config: DecoderConfig, rngs: nnx.Rngs) -> ComRoPE:
    """Trainable rotary positions, which start as RoPE on pairs of neighbouring channels."""
    size, heads = 2 if config.head_dim % 4 else 4, config.num_key_value_heads
    options = {"block_size": size, "init_std": 0.0}
    layer = ComRoPE(heads, config.head_dim, variant="ap", rngs=rngs, **options)
    angles = rope_angles(config.head_dim, size, base=config.rope_theta, num_heads=heads)
    layer.angle_matrices.set_value(angles)
    return layer


class Attention(nnx.Module):
    """Grouped-query causal self-attention; every projection is an `nnx.Linear`."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        attention_implementation: AttentionImplementation | None = None,
        features: RandomFeatures | None = None,
        position: Positions = "rope",
    ) -> None:
        check_implementation(attention_implementation, "attention_implementation")
        self.features = features
        self.comrope = nnx.data(None)
        if position == "comrope":
            self.comrope = comrope_like_rope(config, rngs)
        self.attention_implementation = attention_implementation
        self.head_dim = config.head_dim
        self.sliding_window = config.sliding_window
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim

        def linear(d_in: int, d_out: int, use_bias: bool) -> nnx.Linear:
            return nnx.Linear(
                d_in,
                d_out,
                use_bias=use_bias,
                kernel_init=nnx.initializers.normal(config.initializer_range),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.query = linear(config.hidden_size, query_width, config.query_key_value_bias)
        self.key = linear(config.hidden_size, key_width, config.query_key_value_bias)
        self.value = linear(config.hidden_size, key_width, config.query_key_value_bias)
        self.output = linear(query_width, config.hidden_size, config.attention_bias)
        self.query_norm = self.key_norm = nnx.data(None)
        if config.query_key_norm:
            norm = {"epsilon": config.rms_norm_eps, "param_dtype": param_dtype, "rngs": rngs}
            self.query_norm = RMSNorm(config.head_dim, **norm)
            self.key_norm = RMSNorm(config.head_dim, **norm)

    def __call__(
        self,
        x: jax.Array,
        rotary: Any,
        cache: Cache | None = None,
        position: jax.Array | int = 0,
    ) -> tuple[jax.Array, Any]:
        """Mixes the positions of each sequence.

        Args:
            x: [batch, length, hidden_size].
            rotary: cosine and sine of the positions of `x`, or the positions [length, 1] for
                ComRoPE.
            cache: what is kept of earlier positions, to be read and extended; without it,
                `x` starts at position 0 and attends to itself alone.
            position: where in the cache `x` starts.

        Returns:
            The result, shaped as `x`, and the extended cache (None without one).
        """
        batch, length, width = x.shape
        rows = x.reshape(-1, width)  # see MLP
        query, key, value = (
            jax.lax.optimization_barrier(layer(rows)).reshape(batch, length, -1, self.head_dim)
            for layer in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.comrope is None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        else:
            query, key = self.comrope(query, key, rotary)
        query = checkpoint_name(query, "attention_query")
        key = checkpoint_name(key, "attention_key")
        value = checkpoint_name(value, "attention_value")
        if self.features is not None:
            operands = query, key, value
            if cache is None:
                mixed = random_feature_attention(*operands, features=self.features, is_causal=True)
            else:
                assert isinstance(cache, LinearAttentionState)
                mixed, cache = decode_random_features(*operands, cache, features=self.features)
            mixed = checkpoint_name(mixed, "attention_context")
        elif cache is None:
            # The result is named attention_context inside. Hugging Face counts the position itself
            # into the window, JAX does not.
            window = None if self.sliding_window is None else (self.sliding_window - 1, 0)
            mixed = dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                local_window_size=window,
                implementation=self.attention_implementation,
            )
        else:
            assert isinstance(cache, KeyValueCache)
            cache = cache.write(key, value, position)
            mask = _visible(length, cache.keys.shape[1], position, self.sliding_window)
            mixed = jax.nn.dot_product_attention(query, *cache, mask=mask)
        output = self.output(mixed.reshape(batch * length, -1))
        output = checkpoint_name(output, "attention_output")
        return output.reshape(x.shape), cache


def _visible(length: int, cached: int, position: jax.Array | int, window: int | None) -> jax.Array:
    """Which cached positions a query at `position + i` sees: bool [1, 1, length, cached]."""
    distance = position + jnp.arange(length)[:, None] - jnp.arange(cached)[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    return visible[None, None]
