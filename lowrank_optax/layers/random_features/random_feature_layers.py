"""Both kinds of random-feature attention as layers in Flax NNX."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from lowrank_optax.layers.counts import check_count
from lowrank_optax.layers.random_features.feature_attention import (
    decode_random_features,
    init_random_feature_state,
    random_feature_attention,
)
from lowrank_optax.layers.random_features.feature_maps import (
    RandomFeatures,
    check_seed,
    key_of,
)
from lowrank_optax.layers.random_features.frozen_scores import (
    ScoreMean,
    ScoreWeights,
    check_scores,
    check_weights,
    fit_ridge,
    frozen_score_attention,
    frozen_score_features,
    score_matrices,
)
from lowrank_optax.layers.random_features.linear_attention import LinearAttentionState


class FrozenScoreAttention(nnx.Module):
    """Attention of many heads whose scores are random and frozen: only values are trained.

    The output is linear in ``kernel``, the only parameter. The score matrices are made from the
    seed in each call and are not in the state. With the default values the output's variance is
    that of the kernel for infinitely many heads.

    Args:
      in_features: Width ``d`` of the tokens.
      out_features: Number of outputs.
      num_heads: Number ``M`` of heads.
      mean: Mean of the score matrices: ``"zero"``, or ``"identity"``, which centres scores at the
        product of query and key.
      std: Standard deviation of their entries: 1/2 for tokens of norm 1, ``1 / (d + 1)`` for
        tokens of norm ``√d``.
      weights: ``"relu"``, divided by the number of visible keys, or ``"softmax"``.
      is_causal: Whether position ``i`` sees only positions up to ``i``.
      seed: Seed of the score matrices.
      kernel_init: Initializer of the values ``[M (d + 1), out]``.
      dtype: Dtype of the output; None for that of the inputs.
      param_dtype: Dtype of the values.
      rngs: Random keys for the values.

    Raises:
      ValueError: If a number is not positive or a name is unknown; when called, if widths do not
        fit, tokens are no floats, a mask is not bool, or other keys are given to a causal layer.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.layers.FrozenScoreAttention(8, 3, num_heads=100, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 5, 8))).shape, layer.kernel.shape
      ((2, 5, 3), (900, 3))

    Reference:
      Fu et al., 2023, https://arxiv.org/abs/2307.11353.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_heads: int = 1024,
        *,
        mean: ScoreMean = "zero",
        std: float = 0.5,
        weights: ScoreWeights = "relu",
        is_causal: bool = False,
        seed: int = 0,
        kernel_init: nnx.Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        check_count("num_heads", num_heads)
        check_scores(std, mean)
        check_weights(weights)
        check_seed(seed)
        self.in_features, self.out_features = in_features, out_features
        self.num_heads, self.mean, self.std, self.weights = num_heads, mean, std, weights
        self.is_causal, self.seed, self.dtype = is_causal, seed, dtype
        init = nnx.initializers.normal(1.0) if kernel_init is None else kernel_init
        rows = num_heads * (in_features + 1)
        self.kernel = nnx.Param(init(rngs.params(), (rows, out_features), param_dtype))

    def __call__(
        self, x: jax.Array, keys: jax.Array | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """Compute the outputs ``[..., T, out]``.

        Args:
          x: Tokens ``[..., T, d]``, the queries.
          keys: Keys ``[..., N, d]``; None for the tokens.
          mask: Booleans that broadcast to ``[..., T, N]``: whether a query sees a key.
        """
        keys, mask = self._operands(x, keys, mask)
        out = frozen_score_attention(
            x,
            keys,
            self.kernel[...],
            key_of(self.seed),
            mask=mask,
            std=self.std,
            mean=self.mean,
            weights=self.weights,
        )
        return (out / np.sqrt(self.num_heads)).astype(self.dtype or x.dtype)

    def features(
        self, x: jax.Array, keys: jax.Array | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """The features ``[..., T, M (d + 1)]``, of which ``features @ kernel`` is the output."""
        keys, mask = self._operands(x, keys, mask)
        matrices = score_matrices(
            key_of(self.seed),
            range(self.num_heads),
            self.in_features + 1,
            std=self.std,
            mean=self.mean,
        )
        found = frozen_score_features(x, keys, matrices, mask=mask, weights=self.weights)
        return found.reshape(*found.shape[:-2], -1) / np.sqrt(self.num_heads)

    def fit(
        self,
        x: jax.Array,
        targets: jax.Array,
        penalty: float,
        keys: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> None:
        """Set the values to those of least squares, see `fit_ridge`.

        Args:
          x: Tokens ``[..., T, d]``.
          targets: Targets ``[..., T, out]``.
          penalty: Positive number that multiplies the squares of the values.
          keys: As in a call.
          mask: As in a call.
        """
        features = self.features(x, keys, mask=mask)
        rows = features.reshape(-1, features.shape[-1])
        values = fit_ridge(rows, targets.reshape(-1, self.out_features), penalty)
        self.kernel[...] = values.astype(self.kernel.dtype)

    def _operands(
        self, x: jax.Array, keys: jax.Array | None, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        if self.is_causal and keys is not None:
            raise ValueError("is_causal=True is for tokens that see themselves: leave out keys.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x has dtype {x.dtype}; tokens must have a floating-point dtype.")
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x has shape {x.shape}; its last axis must have in_features={self.in_features}."
            )
        if self.is_causal:
            earlier = jnp.tril(jnp.ones((x.shape[-2],) * 2, bool))
            mask = earlier if mask is None else mask & earlier
        return (x if keys is None else keys), mask


class RandomFeatureAttention(nnx.Module):
    """Causal self-attention whose softmax is approximated by random features.

    Queries, keys, values and outputs have an ``nnx.Linear`` each. Decoding carries a state of
    constant size.

    Args:
      in_features: Width of the tokens.
      num_heads: Number ``N`` of heads of the queries.
      num_key_value_heads: Number ``K`` of heads of the keys, which divides ``N``; None for ``N``.
      features: Number and kind of the features; `RandomFeatures()` by default.
      gated: Whether a trained gate of each head of the keys, ``sigmoid(w · x + b)``, forgets
        earlier positions.
      dtype: Dtype of the products; None promotes inputs and parameters.
      param_dtype: Dtype of the parameters.
      rngs: Random keys for the parameters.

    Raises:
      ValueError: If ``num_heads`` does not divide the width, or ``num_key_value_heads`` does not
        divide ``num_heads``.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.layers.RandomFeatureAttention(32, num_heads=2, gated=True, rngs=nnx.Rngs(0))
      >>> y, state = layer.decode(jnp.ones((1, 1, 32)), layer.init_state(batch=1))
      >>> layer(jnp.ones((1, 5, 32))).shape, state.sums.shape
      ((1, 5, 32), (1, 2, 128, 17))

    Reference:
      Peng et al., 2021, https://arxiv.org/abs/2103.02143; Choromanski et al., 2020,
      https://arxiv.org/abs/2009.14794.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_key_value_heads: int | None = None,
        *,
        features: RandomFeatures | None = None,
        gated: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        heads = num_heads if num_key_value_heads is None else num_key_value_heads
        check_count("num_heads", num_heads)
        check_count("num_key_value_heads", heads)
        if in_features % num_heads or num_heads % heads:
            raise ValueError(
                f"num_heads={num_heads} must divide in_features={in_features}, and "
                f"num_key_value_heads={heads} must divide num_heads."
            )
        self.features = RandomFeatures() if features is None else features
        self.head_dim, self.heads = in_features // num_heads, heads
        width = heads * self.head_dim

        def linear(outputs: int, use_bias: bool = False) -> nnx.Linear:
            types = {"dtype": dtype, "param_dtype": param_dtype}
            return nnx.Linear(in_features, outputs, use_bias=use_bias, rngs=rngs, **types)

        self.query, self.output = linear(in_features), linear(in_features)
        self.key, self.value = linear(width), linear(width)
        self.gate = nnx.data(linear(heads, use_bias=True) if gated else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute the outputs ``[B, T, in_features]`` of tokens of the same shape."""
        q, k, v, gate = self._operands(x)
        options = {"features": self.features, "is_causal": True, "gate": gate}
        return self.output(random_feature_attention(q, k, v, **options).reshape(x.shape))

    def init_state(self, batch: int) -> LinearAttentionState:
        """The state of `decode` before the first position."""
        return init_random_feature_state(self.features, batch, self.heads, self.head_dim)

    def decode(
        self, x: jax.Array, state: LinearAttentionState
    ) -> tuple[jax.Array, LinearAttentionState]:
        """Compute the outputs of the next positions ``[B, T, in_features]``, and the state."""
        q, k, v, gate = self._operands(x)
        out, state = decode_random_features(q, k, v, state, features=self.features, gate=gate)
        return self.output(out.reshape(x.shape)), state

    def _operands(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).reshape(batch, length, -1, self.head_dim)
            for layer in (self.query, self.key, self.value)
        )
        gate = None if self.gate is None else jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
        return q, k, v, gate
