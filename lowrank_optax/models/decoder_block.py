"""One block of the decoder: attention and MLP, or experts, each on the normed residual stream."""

from typing import Any

from flax import nnx
import jax
from jax.typing import DTypeLike

from lowrank_optax.layers.attention.implementations import AttentionImplementation
from lowrank_optax.layers.random_features.feature_maps import RandomFeatures
from lowrank_optax.layers.structured.base import Structure
from lowrank_optax.layers.widenet.expert_layers import MixtureOfExperts
from lowrank_optax.layers.widenet.expert_routing import Experts
from lowrank_optax.layers.widenet.mixture import RoutingStatistics
from lowrank_optax.models.attention import Attention, Cache, Positions, RMSNorm
from lowrank_optax.models.decoder_config import DecoderConfig
from lowrank_optax.models.feed_forward import MLP, ExpertMLPs, StructuredMLP

NORMS = ("attention_norm", "mlp_norm")
"""What a block has of its own where all blocks are one."""


class Block(nnx.Module):
    """One layer: attention and MLP, each on the normed residual stream and added to it."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        activation_bits: int | None = None,
        attention_implementation: AttentionImplementation | None = None,
        features: RandomFeatures | None = None,
        position: Positions = "rope",
        structure: Structure | None = None,
        guide: bool = False,
        experts: Experts | None = None,
        shared: "Block | None" = None,
    ) -> None:
        types = {"param_dtype": param_dtype, "rngs": rngs}
        norm = lambda: RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **types)
        self.attention_norm = norm()
        if shared is not None:
            self.attention, self.mlp_norm, self.mlp = shared.attention, norm(), shared.mlp
            return
        self.attention = Attention(
            config,
            dtype=dtype,
            attention_implementation=attention_implementation,
            features=features,
            position=position,
            **types,
        )
        self.mlp_norm = norm()
        options = {"dtype": dtype, "activation_bits": activation_bits, **types}
        if experts is not None:
            init = nnx.initializers.normal(config.initializer_range)
            mlps = ExpertMLPs(config, experts.num_experts, **options)
            width = config.hidden_size
            self.mlp = MixtureOfExperts(mlps, width, experts, router_init=init, **types)
        elif structure is None:
            self.mlp = MLP(config, **options)
        else:
            self.mlp = StructuredMLP(config, structure, guide=guide, **options)

    def __call__(
        self,
        x: jax.Array,
        rotary: Any,
        cache: Cache | None,
        position: jax.Array | int,
        training: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, RoutingStatistics | None]:
        """As `Attention.__call__`, for the whole layer; and what its experts say of the tokens."""
        mixed, cache = self.attention(self.attention_norm(x), rotary, cache, position)
        x = x + mixed
        normed, mlp = self.mlp_norm(x), self.mlp
        if not isinstance(mlp, MixtureOfExperts):
            return x + mlp(normed), cache, None
        y, routing = mlp(normed, training=training, key=key)
        return x + y, cache, routing
