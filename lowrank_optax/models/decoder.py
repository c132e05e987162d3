"""The Llama family's decoder in Flax NNX: Llama, Mistral, Qwen2 and Qwen3.

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU MLP (Touvron et al.
2023, https://arxiv.org/abs/2302.13971). The blocks are either one stacked module run by a scan,
which compiles once for all layers, or a list run one after the other.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.layers import maestro
from lowrank_optax.layers.attention.implementations import AttentionImplementation
from lowrank_optax.layers.random_features.feature_attention import init_random_feature_state
from lowrank_optax.layers.random_features.feature_maps import RandomFeatures
from lowrank_optax.layers.structured.base import Structure
from lowrank_optax.layers.widenet.expert_routing import Experts
from lowrank_optax.layers.widenet.mixture import RoutingStatistics
from lowrank_optax.layers.widenet.widenet_block import experts_of
from lowrank_optax.models.attention import Cache, KeyValueCache, Positions, RMSNorm, features_of
from lowrank_optax.models.decoder_block import NORMS, Block
from lowrank_optax.models.decoder_config import DecoderConfig
from lowrank_optax.models.feed_forward import structure_of
from lowrank_optax.models.huggingface_config import MODULE_NAMES
from lowrank_optax.models.remat import Remat, check_remat, check_remat_every
from lowrank_optax.models.rotary import inverse_frequencies, rotary_angles
from lowrank_optax.models.running_blocks import run_blocks


def _check(
    config: DecoderConfig,
    position: str,
    structure: Structure | None,
    guide: bool,
    share_blocks: bool,
    experts: Experts | None,
    linear: str | None,
) -> None:
    """Raises ValueError for a decoder's options that are unknown, or make no sense together."""
    if position not in get_args(Positions):
        raise ValueError(f"position must be 'rope' or 'comrope', got {position!r}")
    if position == "comrope" and config.rope_scaling is not None:
        raise ValueError(
            "position='comrope' trains its frequencies: leave rope_scaling out of the config"
        )
    if structure is None and guide:
        raise ValueError("guide=True is for structured matrices: give feed_forward, too")
    if structure is not None and config.num_hidden_layers < 2:
        raise ValueError("feed_forward leaves the first block dense: have 2 blocks or more")
    if structure is not None and (share_blocks or experts is not None):
        raise ValueError(
            "feed_forward has a first block of its own, with a dense MLP: leave it, or "
            "share_blocks and experts, out"
        )
    if linear not in (None, "maestro"):
        raise ValueError(f"linear must be 'maestro' or None, got {linear!r}")
    if linear is not None and experts is not None:
        raise ValueError(f"linear={linear!r} does not convert experts: leave one out")


class Decoder(nnx.Module):
    """A decoder-only language model of the Llama family.

    Parameters, in JAX's layout (`y = x @ kernel`), L layers stacked in front where
    `scan_layers` is true: `embed.embedding` [vocab, hidden]; in `blocks` the norms' `scale`
    [L, hidden], and the kernels [L, d_in, d_out] of `attention.query`, `.key`, `.value`,
    `.output` and `mlp.gate`, `.up`, `.down`; `norm.scale` [hidden]; `lm_head.kernel`
    [hidden, vocab], absent where the embedding is tied. Unrolled, `blocks` is an `nnx.List`.

    Args:
        config: the shape.
        rngs: source of the initial weights: normal with `config.initializer_range`, norms one.
        dtype: dtype of the activations. Norms, softmax, rotation and logits are in float32.
        param_dtype: dtype of the weights.
        scan_layers: run one stacked block by a scan (compiles L times faster), or L blocks one
            after the other (somewhat faster on CPU).
        remat: what of a block is saved for the backward pass: None saves what it needs, `"full"`
            saves the block's input alone and recomputes everything else; otherwise the name of a
            policy in `jax.checkpoint_policies`, a policy, or a table from the names of
            intermediates (`attention_query`, `_key`, `_value`, `_context` and `_output`,
            `mlp_gate`, `mlp_up`, `mlp_hidden`) to what becomes of them; see
            `lowrank_optax.activations.policy`. A number of bits is for `mlp_gate` and `mlp_up`.
        remat_every: with `remat="full"`, save the input of every `remat_every`-th block alone. That
            many blocks are run again to have the inputs of each, which is nearly one more forward
            pass. It divides the number of blocks (with a `first_block`, of the others).
        activation_bits: bits per element, 1 to 8, that are saved of an MLP's gate and of its up
            (see `lowrank_optax.activations.swiglu`); None saves them as they are.
        attention_implementation: name of the implementation of attention, see
            `lowrank_optax.layers.dot_product_attention`; None chooses by length and backend. With
            a cache it is always the plain one.
        attention: `"softmax"`; or `"random-features"`, which approximates it in linear time and
            with a cache of constant size, by 128 positive features or those of a
            `lowrank_optax.layers.RandomFeatures` given instead.
        position: `"rope"`; or `"comrope"`, trainable rotary positions in each block,
            `attention.comrope.angle_matrices`. They start as RoPE that rotates neighbouring
            channels, which are not those of Hugging Face's weights, and are always float32.
        feed_forward: structure of the MLPs' matrices in all blocks but the first, which stays
            dense: `"lowrank"`, `"blockdense"` or `"blockshuffle"`, of which each has about a third
            of the parameters, or a structure such as `lowrank_optax.layers.BlockShuffle(4)`; None
            for dense. In `mlp`, one structured layer `gate_up` makes gate and up, and another is
            `down`. With `scan_layers` the dense block is `first_block`, and `blocks` the others.
        guide: whether each structured matrix has a dense guide, see
            `lowrank_optax.layers.set_guide_weight`.
        share_blocks: whether all blocks are one, which exists once in the parameters, but for the
            norms: in `blocks` they alone are stacked (WideNet).
        experts: number of experts in place of each MLP, of which every token takes two, or all
            options of the mixture; None for one dense MLP. The kernels of `mlp.experts.gate`,
            `.up` and `.down` are then [experts, d_in, d_out], and `mlp.router` [hidden, experts].
            Train with `hidden_and_routing`: other calls drop no token, and have no load-balance
            loss.
        linear: `"maestro"` makes all dense linear layers of the blocks
            `lowrank_optax.layers.MaestroLinear`, which find their own ranks; None leaves them.

    Raises:
        ValueError: `remat` is not the name of a policy, or a table names what a block does not
            have, or gives bits to one of the other intermediates, to mlp_gate and mlp_up without
            an entry of mlp_hidden, or beside `activation_bits`; or `remat_every` does not divide
            the number of blocks, or comes with another `remat` than `"full"`; or one of these is
            out of range; or `attention_implementation` is not the name of an implementation; or
            `feed_forward` is no name, does not fit the sizes or one block, or `guide` is given
            without it; or `linear` is no name; or `feed_forward` comes with `share_blocks` or
            `experts`, or `linear` with `experts`; or the options of experts are out of range.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> from lowrank_optax.models import Decoder, decoder_config
        >>> model = Decoder(decoder_config("llama-tiny", vocab_size=257), rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 8), jnp.int32)).shape
        (1, 8, 257)
        >>> model.blocks.mlp.gate.kernel.shape
        (4, 128, 344)
    """

    huggingface_names: ClassVar[Mapping[str, str]] = MODULE_NAMES

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        scan_layers: bool = True,
        remat: Remat = None,
        remat_every: int = 1,
        activation_bits: int | None = None,
        attention_implementation: AttentionImplementation | None = None,
        attention: Literal["softmax", "random-features"] | RandomFeatures = "softmax",
        position: Positions = "rope",
        feed_forward: str | Structure | None = None,
        guide: bool = False,
        share_blocks: bool = False,
        experts: int | Experts | None = None,
        linear: Literal["maestro"] | None = None,
    ) -> None:
        self.config = config
        structure = structure_of(feed_forward, config)
        experts = None if experts is None else experts_of(experts)
        _check(config, position, structure, guide, share_blocks, experts, linear)
        self.features = features_of(attention, config, attention_implementation)
        self.position, self.share_blocks, self.experts = position, share_blocks, experts
        self.dtype = jnp.dtype(dtype)
        self.scan_layers = scan_layers
        self.remat, activation_bits = check_remat(remat, activation_bits)
        self.remat_every = remat_every
        with_first_block = scan_layers and structure is not None
        check_remat_every(remat_every, remat, config.num_hidden_layers - with_first_block)
        types = {"dtype": dtype, "param_dtype": param_dtype}
        init = nnx.initializers.normal(config.initializer_range)
        self.embed = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=init, rngs=rngs, **types
        )
        options: dict[str, Any] = {
            "activation_bits": activation_bits,
            "attention_implementation": attention_implementation,
            "features": self.features,
            "position": position,
            **types,
        }
        self._make_blocks(rngs, options, structure, guide)
        if linear is not None:
            # The spectral split of dense layers is how Maestro's layers start.
            maestro.convert(self, where=r"^(first_block|blocks)/")
        self.norm = RMSNorm(
            config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype, rngs=rngs
        )
        self.lm_head = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                kernel_init=init,
                preferred_element_type=jnp.float32,
                rngs=rngs,
                **types,
            )

    def _make_blocks(
        self, rngs: nnx.Rngs, options: dict[str, Any], structure: Structure | None, guide: bool
    ) -> None:
        """Makes `blocks` and `first_block`, which is dense beside structured ones in a stack."""
        config, count = self.config, self.config.num_hidden_layers
        make: Any = lambda rngs, **shared: Block(
            config,
            rngs=rngs,
            structure=structure,
            guide=guide,
            experts=self.experts,
            **options,
            **shared,
        )
        dense = None if structure is None else Block(config, rngs=rngs, **options)
        self.first_block = nnx.data(dense if self.scan_layers else None)
        count -= self.first_block is not None
        stacked = lambda make: nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)
        if not self.scan_layers:
            first = make(rngs) if dense is None else dense
            shared = first if self.share_blocks else None
            rest = [make(rngs, shared=shared) for _ in range(count - 1)]
            self.blocks = nnx.List([first, *rest])
        elif self.share_blocks:
            self.blocks = make(rngs)
            norm = {"epsilon": config.rms_norm_eps, "param_dtype": options["param_dtype"]}
            for name in NORMS:
                norms = stacked(lambda rngs: RMSNorm(config.hidden_size, rngs=rngs, **norm))
                setattr(self.blocks, name, norms)
        else:
            self.blocks = stacked(make)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The logits of the token after each position.

        Args:
            tokens: integers [batch, length]; a token outside the vocabulary gives NaN.

        Returns:
            float32 [batch, length, vocab_size].

        Raises:
            ValueError: `tokens` is not a two-dimensional array of integers.
        """
        return self.logits(self.hidden(tokens))

    def decode(
        self, tokens: jax.Array, cache: Cache | None, position: jax.Array | int
    ) -> tuple[jax.Array, Any]:
        """As `__call__` for tokens that continue a text that is cached.

        Args:
            tokens: integers [batch, length], the positions `position` to `position + length - 1`.
            cache: from `init_cache` or the call before; None to start without.
            position: where the tokens start; a scalar, which may be traced.

        Returns:
            The logits, float32 [batch, length, vocab_size], and the cache with these tokens in.
        """
        x, cache, _ = self._hidden(tokens, cache, position)
        return self.logits(x), cache

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """The hidden states [batch, length, hidden_size] after the final norm, without logits.

        Takes the tokens of `__call__`, which gives the product of these states and `head`.
        """
        return self._hidden(tokens, None, 0)[0]

    def hidden_and_routing(
        self, tokens: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, RoutingStatistics]:
        """As `hidden` in training of a model with experts: these have a limited capacity.

        Args:
            tokens: as for `__call__`.
            key: PRNG key of the noise on the routers' logits; None for no noise.

        Returns:
            The hidden states, and how each layer distributed the tokens: a multiple of
            `balance_loss.sum()`, usually 0.01, is to be added to the loss.

        Raises:
            ValueError: the model has no experts, or one has no room for any of these tokens.
        """
        if self.experts is None:
            raise ValueError("the model has no experts: call hidden, or give Decoder experts=...")
        x, _, routing = self._hidden(tokens, None, 0, training=True, key=key)
        return x, routing

    def head(self) -> tuple[jax.Array, int]:
        """The weight of the output layer, and which of its axes is the hidden states' (0 or 1).

        Returns:
            `lm_head.kernel` [hidden, vocab] and 0; the embedding [vocab, hidden] and 1 if tied.

        Raises:
            ValueError: an adapter, a bias or another change makes that layer more than its weight.
        """
        name = "embed" if self.lm_head is None else "lm_head"
        layer = getattr(self, name)
        plain = type(layer) in (nnx.Linear, nnx.Embed)
        if not plain or getattr(layer, "bias", None) is not None:
            raise ValueError(
                f"the layer {name!r} computes more than a product with its weight (it has an "
                "adapter or a bias, or was replaced): call the model for its logits, or leave this "
                "layer out"
            )
        return (layer.embedding[...], 1) if self.lm_head is None else (layer.kernel[...], 0)

    def _hidden(
        self,
        tokens: jax.Array,
        cache: Cache | None,
        position: jax.Array | int,
        training: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        x, rotary = self._embedded(tokens), self._rotary(tokens.shape[1], position)
        keys = None if key is None else jax.random.split(key, self.config.num_hidden_layers)
        x, cache, routing = run_blocks(self, x, rotary, cache, position, training, keys)
        return self.after_blocks(x), cache, routing

    def before_blocks(self, tokens: jax.Array) -> jax.Array:
        """The input of `blocks` [batch, length, hidden_size]: the tokens' embeddings.

        With a `first_block` it is that block's output.

        Raises:
            ValueError: the blocks have no weights or no loss of their own, so that they cannot be
                trained one by one.
        """
        if self.share_blocks or self.experts is not None:
            name = "share_blocks" if self.share_blocks else "experts"
            raise ValueError(
                f"a decoder with {name} is not trained block by block: its blocks share their "
                "weights, or add to the loss. Compute the gradient of all weights."
            )
        x = self._embedded(tokens)
        return x if self.first_block is None else self.through_block(self.first_block, x)

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                "tokens must be integers of shape [batch, length], "
                f"got {tokens.dtype} of shape {tokens.shape}"
            )
        return self.embed(tokens)

    def through_block(self, block: Block, x: jax.Array) -> jax.Array:
        """The output of one block for texts that start at position 0, shaped as `x`."""
        return block(x, self._rotary(x.shape[1], 0), None, 0)[0]

    def after_blocks(self, x: jax.Array) -> jax.Array:
        """The hidden states: the final norm of the last block's output."""
        return self.norm(x)

    def _rotary(self, length: int, position: jax.Array | int) -> Any:
        config = self.config
        if self.position == "comrope":
            return (position + jnp.arange(length)).astype(jnp.float32)[:, None]
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return rotary_angles(position + jnp.arange(length), frequencies)

    def logits(self, x: jax.Array) -> jax.Array:
        """The logits [..., vocab_size], float32, of hidden states [..., hidden_size]."""
        rows = x.reshape(-1, x.shape[-1])
        if self.lm_head is not None:
            logits = self.lm_head(rows)
        else:
            embedding = self.embed.embedding[...].astype(x.dtype)
            logits = jnp.matmul(rows, embedding.T, preferred_element_type=jnp.float32)
        return logits.reshape(*x.shape[:-1], logits.shape[-1])

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for texts of `length` tokens, the layers stacked in front.

        That of random features has the same size for all lengths.
        """
        config = self.config
        if self.features is not None:
            sizes = batch, config.num_key_value_heads, config.head_dim
            state = init_random_feature_state(self.features, *sizes)
            layers = config.num_hidden_layers
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), state)
        heads = (config.num_key_value_heads, config.head_dim)
        empty = jnp.zeros((config.num_hidden_layers, batch, length, *heads), self.dtype)
        return KeyValueCache(empty, empty)
