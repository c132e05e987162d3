"""The feed-forward of a decoder's block: a gated MLP, structured ones, one for each expert."""

from collections.abc import Callable

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.activations.gating import swiglu
from lowrank_optax.layers.structured.base import Structure
from lowrank_optax.layers.structured.feed_forward_layers import StructuredLinear, check_structure
from lowrank_optax.layers.structured.structures import BlockDense, BlockShuffle, LowRank
from lowrank_optax.layers.widenet.expert_layers import call_expert_linear, expert_linear
from lowrank_optax.models.decoder_config import DecoderConfig
from lowrank_optax.models.remat import GATED

# Wei et al. 2024 (https://arxiv.org/abs/2406.16450), the sizes with about 32 % of the parameters.
NAMED: dict[str, Callable[[DecoderConfig], Structure]] = {
    "lowrank": lambda config: LowRank(rank=max(config.hidden_size // 4, 1)),
    "blockdense": lambda config: BlockDense(rank=max(config.hidden_size // 6, 1) * 2, blocks=2),
    "blockshuffle": lambda config: BlockShuffle(blocks=4),
}
"""Structures by the names that a decoder takes."""


def structure_of(feed_forward: str | Structure | None, config: DecoderConfig) -> Structure | None:
    """The structure that a decoder's `feed_forward` means, checked against its sizes.

    Raises:
        ValueError: there is no such name, or the structure does not fit the sizes.
        TypeError: it is neither a name nor a structure.
    """
    if feed_forward is None:
        return None
    if isinstance(feed_forward, str):
        if feed_forward not in NAMED:
            raise ValueError(
                f"feed_forward must be a structure or one of {', '.join(map(repr, NAMED))}, got "
                f"{feed_forward!r}"
            )
        feed_forward = NAMED[feed_forward](config)
    check_structure(feed_forward)
    hidden, width = config.hidden_size, config.intermediate_size
    for inputs, outputs in ((hidden, 2 * width), (width, hidden)):
        try:
            feed_forward.shapes(inputs, outputs)
        except ValueError as error:
            raise ValueError(
                f"feed_forward={feed_forward} does not fit hidden_size {hidden} and "
                f"intermediate_size {width}: {error}"
            ) from None
    return feed_forward


def gated(gate: jax.Array, up: jax.Array, bits: int | None) -> jax.Array:
    """The gated activation, which saves its inputs in bits if these are given; all are named."""
    gate, up = checkpoint_name(gate, "mlp_gate"), checkpoint_name(up, "mlp_up")
    hidden = nnx.silu(gate) * up if bits is None else swiglu(gate, up, bits, names=GATED)
    return checkpoint_name(hidden, "mlp_hidden")


class MLP(nnx.Module):
    """The gated MLP: `down(silu(gate(x)) * up(x))`."""

    down: nnx.Linear | StructuredLinear

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        activation_bits: int | None = None,
    ) -> None:
        self.activation_bits = activation_bits
        init = nnx.initializers.normal(config.initializer_range)
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        options = {"use_bias": config.mlp_bias, "kernel_init": init, **types}
        self.gate = nnx.Linear(config.hidden_size, config.intermediate_size, **options)
        self.up = nnx.Linear(config.hidden_size, config.intermediate_size, **options)
        self.down = nnx.Linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., hidden_size] to the same shape."""
        # Flat, because the gradient of a kernel is then one plain matrix product; with a batch
        # and a length axis XLA's CPU backend transposes the activations first.
        rows = x.reshape(-1, x.shape[-1])
        hidden = gated(*self.gate_and_up(rows), self.activation_bits)
        return self.down(hidden).reshape(x.shape)

    def gate_and_up(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both inputs of the gated activation, [n, intermediate_size]."""
        return self.gate(rows), self.up(rows)


class StructuredMLP(MLP):
    """The same of two structured matrices; one makes gate and up, in this order."""

    def __init__(
        self,
        config: DecoderConfig,
        structure: Structure,
        *,
        guide: bool,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        activation_bits: int | None = None,
    ) -> None:
        self.activation_bits = activation_bits
        hidden, width = config.hidden_size, config.intermediate_size
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = {"initializer_range": config.initializer_range, "guide": guide}
        options = {"use_bias": config.mlp_bias, **init, **types}
        self.gate_up = StructuredLinear(hidden, 2 * width, structure, **options)
        self.down = StructuredLinear(width, hidden, structure, **options)

    def gate_and_up(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both inputs of the gated activation, [n, intermediate_size]."""
        gate, up = jnp.split(self.gate_up(rows), 2, axis=-1)
        return gate, up


class ExpertMLPs(nnx.Module):
    """One gated MLP for each expert: kernels [experts, d_in, d_out]."""

    def __init__(
        self,
        config: DecoderConfig,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        activation_bits: int | None = None,
    ) -> None:
        self.activation_bits = activation_bits
        init = nnx.initializers.normal(config.initializer_range)
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        options = {"use_bias": config.mlp_bias, "kernel_init": init, **types}
        hidden, width = config.hidden_size, config.intermediate_size
        self.gate = expert_linear(num_experts, hidden, width, **options)
        self.up = expert_linear(num_experts, hidden, width, **options)
        self.down = expert_linear(num_experts, width, hidden, **options)

    def __call__(
        self, rows: jax.Array, sizes: jax.Array | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """As `lowrank_optax.layers.ExpertFFN`, without dropout."""
        del key
        gate, up = (call_expert_linear(layer, rows, sizes) for layer in (self.gate, self.up))
        return call_expert_linear(self.down, gated(gate, up, self.activation_bits), sizes)
