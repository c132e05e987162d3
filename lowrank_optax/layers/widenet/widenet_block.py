"""WideNet's block: one attention and one mixture of experts, applied many times."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.layers.counts import check_count
from lowrank_optax.layers.widenet.expert_layers import ExpertFFN, MixtureOfExperts
from lowrank_optax.layers.widenet.expert_routing import Experts
from lowrank_optax.layers.widenet.mixture import RoutingStatistics


class WideNetBlock(nnx.Module):
    """A transformer block that is applied ``L`` times, with two layer norms of its own each time.

    Attention, router and experts exist once, whatever the depth: so do their gradients and their
    optimizer state. Only the norms, ``4 d`` numbers for each of the ``L`` applications, tell them
    apart. The applications are a scan.

    Args:
      features: Width ``d`` of the tokens.
      num_heads: Number of heads of attention; it divides ``d``.
      hidden_features: Width ``f`` of an expert's hidden units.
      num_layers: Number ``L`` of applications.
      experts: Number of experts, of which each token takes two, or all options. One expert is a
        dense feed-forward.
      activation: Nonlinearity of the experts; GELU by its tanh formula by default.
      dropout_rate: Probability with which experts drop hidden units and outputs in training.
      is_causal: Whether a token attends only to those before it and to itself.
      remat: Whether each application is computed again in the backward pass, which then needs
        only its input.
      dtype: Dtype of the computation; None for that of inputs and weights. Norms, router and gates
        are computed in float32.
      param_dtype: Dtype of the weights.
      rngs: Random keys for the weights.

    Raises:
      ValueError: If a number is not positive, ``num_heads`` does not divide ``features``, or
        ``dropout_rate`` is not a probability.

    Example:
      >>> from flax import nnx
      >>> import jax, lowrank_optax as lro
      >>> block = lro.layers.WideNetBlock(32, 4, 64, num_layers=6, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (2, 10, 32))
      >>> y, routing = block(x, training=True, key=jax.random.key(1))
      >>> y.shape, routing.load.shape
      ((2, 10, 32), (6, 4))
      >>> loss = (y ** 2).mean() + 0.01 * routing.balance_loss.sum()

    Reference:
      Xue et al., 2021, Go Wider Instead of Deeper, https://arxiv.org/abs/2107.11817.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        hidden_features: int,
        num_layers: int,
        experts: int | Experts = 4,
        *,
        activation: Callable[[jax.Array], jax.Array] = nnx.gelu,
        dropout_rate: float = 0.0,
        is_causal: bool = False,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = {"features": features, "num_heads": num_heads, "num_layers": num_layers}
        for name, value in (sizes | {"hidden_features": hidden_features}).items():
            check_count(name, value)
        if features % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide features={features}.")
        options = experts_of(experts)
        self.is_causal, self.remat, self.num_layers = is_causal, remat, num_layers
        self.dtype = dtype
        types = {"dtype": dtype, "param_dtype": param_dtype}
        self.attention = nnx.MultiHeadAttention(
            num_heads,
            features,
            decode=False,
            kernel_init=nnx.initializers.glorot_uniform(),
            rngs=rngs,
            **types,
        )
        ffn = ExpertFFN(
            options.num_experts,
            features,
            hidden_features,
            activation=activation,
            dropout_rate=dropout_rate,
            rngs=rngs,
            **types,
        )
        self.mlp = MixtureOfExperts(ffn, features, options, param_dtype=param_dtype, rngs=rngs)
        make = nnx.vmap(lambda rngs: nnx.LayerNorm(features, epsilon=1e-6, rngs=rngs, **types))
        split = nnx.split_rngs(splits=num_layers)
        self.attention_norm, self.mlp_norm = split(make)(rngs), split(make)(rngs)

    def __call__(
        self,
        x: jax.Array,
        *,
        training: bool = False,
        key: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, RoutingStatistics]:
        """Apply the block ``L`` times.

        Args:
          x: Tokens ``[B, N, d]``.
          training: Whether experts have a limited capacity; otherwise no choice is dropped.
          key: PRNG key of the router's noise and of dropout, in training.
          mask: Booleans ``[B, N]``, False for padding, which no token attends to, and which counts
            as 0 whatever it holds.

        Returns:
          The tokens ``[B, N, d]``, in the wider of their dtype and that of the computation, and how
          each application distributed them.

        Raises:
          ValueError: If shapes do not fit, or as `MixtureOfExperts`.
        """
        router = self.mlp.router[...]
        width = len(router)
        if x.ndim != 3 or x.shape[-1] != width:
            raise ValueError(f"x must be [B, N, {width}], got shape {x.shape}.")
        if mask is not None:
            if mask.shape != x.shape[:2] or mask.dtype != bool:
                raise ValueError(
                    f"mask must be booleans of shape {x.shape[:2]}, got {mask.dtype} of shape "
                    f"{mask.shape}."
                )
            x = jnp.where(mask[..., None], x, 0)  # attention weighs padding by 0, and 0 NaN is NaN
        # The scan's carry has one dtype: that of sums of x with what a layer computes.
        x = x.astype(jnp.result_type(x, self.dtype or router))
        is_norm = lambda path, _: path[0] in ("attention_norm", "mlp_norm")
        graphdef, norms, shared = nnx.split(self, is_norm, ...)

        def apply(x: jax.Array, own: Any) -> tuple[jax.Array, RoutingStatistics]:
            norms, key = own
            block = nnx.merge(graphdef, norms, shared)
            return block.apply_once(x, training=training, key=key, mask=mask)

        # A scan keeps XLA from merging the recomputation with the first pass.
        step = jax.checkpoint(apply, prevent_cse=False) if self.remat else apply
        keys = None if key is None else jax.random.split(key, self.num_layers)
        return jax.lax.scan(step, x, (norms, keys))

    def apply_once(
        self, x: jax.Array, *, training: bool, key: jax.Array | None, mask: jax.Array | None
    ) -> tuple[jax.Array, RoutingStatistics]:
        """One application, for a block whose norms are those of one layer."""
        seen = None if mask is None else mask[:, None, None, :]
        mixed = self.attention(self.attention_norm(x), mask=seen, is_causal=self.is_causal)
        x = x + mixed
        y, routing = self.mlp(self.mlp_norm(x), training=training, key=key, mask=mask)
        return x + y, routing


def experts_of(experts: int | Experts) -> Experts:
    """The options of a mixture, for a number of experts of which each token takes two."""
    if isinstance(experts, Experts):
        return experts
    few = isinstance(experts, int) and not isinstance(experts, bool) and experts < 2
    return Experts(experts, top_k=1 if few else 2)
