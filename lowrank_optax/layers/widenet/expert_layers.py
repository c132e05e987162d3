"""Mixtures of experts in Flax NNX."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.typing import DTypeLike

from lowrank_optax.layers.widenet.expert_routing import Experts, dropless
from lowrank_optax.layers.widenet.mixture import (
    RoutingStatistics,
    grouped_linear,
    mixture_of_experts,
)

_PER_EXPERT = nnx.initializers.glorot_uniform(batch_axis=(0,))


def expert_linear(
    num_experts: int,
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    kernel_init: nnx.Initializer = _PER_EXPERT,
    **options: Any,
) -> nnx.Einsum:
    """Return one linear layer for each expert: kernels ``[E, d, f]``, biases ``[E, f]``.

    It is an ``nnx.Einsum`` of rows in slots, ``[E, n, d]``, which adapters and optimizers know;
    `call_expert_linear` calls it with grouped rows, too.

    Args:
      num_experts: Number ``E`` of experts.
      in_features: Width ``d`` of the inputs.
      out_features: Width ``f`` of the outputs.
      use_bias: Whether there are biases.
      kernel_init: Initializer of the kernels; Glorot's with the sides of one expert by default.
      options: As for ``nnx.Einsum``: dtypes, ``bias_init``, ``rngs``.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.layers.expert_linear(4, 8, 16, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((4, 10, 8))).shape
      (4, 10, 16)
    """
    kernel = (num_experts, in_features, out_features)
    bias = (num_experts, out_features) if use_bias else None
    return nnx.Einsum("end,edf->enf", kernel, bias, kernel_init=kernel_init, **options)


def call_expert_linear(
    layer: nnx.Einsum, rows: jax.Array, sizes: jax.Array | None = None
) -> jax.Array:
    """Multiply the rows of each expert by its kernel, in slots or grouped.

    Args:
      layer: Layer of `expert_linear`.
      rows: Rows in slots ``[E, n, d]``; or, with ``sizes``, ``[n, d]``, ordered by experts.
      sizes: Number of rows of each expert, integers ``[E]``.

    Returns:
      ``[E, n, f]``, or ``[n, f]``, as `grouped_linear`.

    Raises:
      ValueError: If the rows are of another number of experts; or if they are grouped, and the
        layer has an adapter, a precision or another call of its own.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer, sizes = lro.layers.expert_linear(3, 8, 16, rngs=nnx.Rngs(0)), jnp.array([2, 0, 3])
      >>> lro.layers.call_expert_linear(layer, jnp.ones((5, 8)), sizes).shape
      (5, 16)
    """
    given, own = len(rows if sizes is None else sizes), layer.kernel_shape[0]
    if given != own:  # an einsum would repeat a single expert
        raise ValueError(f"rows of {given} experts, for a layer of {own}: give it those of {own}.")
    if sizes is None:
        return layer(rows)
    if not _takes_groups(layer):
        raise ValueError(
            f"{type(layer).__name__} has an adapter, a precision or another call of its own, which "
            "takes rows in slots: use dispatch='slots'."
        )
    kernel, bias = layer.kernel[...], None if layer.bias is None else layer.bias[...]
    dtype = layer.dtype or jnp.result_type(rows, kernel)
    rows, kernel, bias = jax.tree.map(lambda x: x.astype(dtype), (rows, kernel, bias))
    return grouped_linear(rows, kernel, bias, sizes=sizes)


def _takes_groups(layer: nnx.Einsum) -> bool:
    """Whether a layer is no more than its kernel and bias, which grouped products take."""
    own = layer.precision is not None or layer.preferred_element_type is not None
    return type(layer) is nnx.Einsum and layer.einsum_op is jnp.einsum and not own


class ExpertFFN(nnx.Module):
    """The feed-forwards of all experts: linear, activation, linear.

    Args:
      num_experts: Number ``E`` of experts.
      features: Width ``d`` of inputs and outputs.
      hidden_features: Width ``f`` between.
      activation: Nonlinearity; GELU by its tanh formula by default.
      dropout_rate: Probability with which hidden units and outputs are dropped in training.
      dtype: Dtype of the computation; None for that of inputs and weights.
      param_dtype: Dtype of the weights.
      rngs: Random keys for the weights.

    Raises:
      ValueError: If ``dropout_rate`` is not a probability.

    Example:
      See `MixtureOfExperts`.
    """

    def __init__(
        self,
        num_experts: int,
        features: int,
        hidden_features: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = nnx.gelu,
        dropout_rate: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if not 0 <= dropout_rate <= 1:
            raise ValueError(f"dropout_rate must be from 0 to 1, got {dropout_rate!r}.")
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        options["bias_init"] = nnx.initializers.normal(1e-6)
        self.up = expert_linear(num_experts, features, hidden_features, **options)
        self.down = expert_linear(num_experts, hidden_features, features, **options)
        self.activation = activation
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(
        self, rows: jax.Array, sizes: jax.Array | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Compute all experts, each its own rows; with a key, in training."""
        keys = [None, None] if key is None else jax.random.split(key)
        drop = lambda x, k: self.dropout(x, deterministic=k is None, rngs=k)
        hidden = drop(self.activation(call_expert_linear(self.up, rows, sizes)), keys[0])
        return drop(call_expert_linear(self.down, hidden, sizes), keys[1])


class MixtureOfExperts(nnx.Module):
    """A mixture of experts instead of a feed-forward.

    Args:
      experts: Module of all experts, such as `ExpertFFN`: ``experts(rows, sizes, key=key)``.
      features: Width ``d`` of the tokens.
      options: Numbers of experts and of choices, and the capacity.
      router_init: Initializer of ``router``, ``[d, E]``; Glorot's uniform one by default.
      param_dtype: Dtype of the router; it is converted to float32 in each call.
      rngs: Random keys for the router.

    Example:
      >>> from flax import nnx
      >>> import jax, lowrank_optax as lro
      >>> rngs = nnx.Rngs(0)
      >>> experts = lro.layers.ExpertFFN(4, 8, 16, rngs=rngs)
      >>> layer = lro.layers.MixtureOfExperts(experts, 8, lro.layers.Experts(4), rngs=rngs)
      >>> y, statistics = layer(jax.random.normal(jax.random.key(0), (2, 12, 8)))
      >>> y.shape, float(statistics.dropped)
      ((2, 12, 8), 0.0)

    Reference:
      Xue et al., 2021, https://arxiv.org/abs/2107.11817, section 3.1.
    """

    def __init__(
        self,
        experts: nnx.Module,
        features: int,
        options: Experts,
        *,
        router_init: nnx.Initializer | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.experts, self.options = experts, options
        init = nnx.initializers.glorot_uniform() if router_init is None else router_init
        shape = (features, options.num_experts)
        # Not a layer: nothing that adapts or converts layers should change who computes what.
        self.router = nnx.Param(init(rngs.params(), shape, param_dtype))

    def __call__(
        self,
        x: jax.Array,
        *,
        training: bool = False,
        key: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, RoutingStatistics]:
        """Compute the outputs of tokens.

        Args:
          x: Tokens ``[..., d]``.
          training: Whether experts have a limited capacity; otherwise no choice is dropped.
          key: PRNG key of the router's noise and of dropout, in training.
          mask: Booleans ``[...]``, False for padding.

        Returns:
          The outputs, shaped as ``x``, and how the tokens were distributed.

        Raises:
          ValueError: As `mixture_of_experts`, or if a key is given without ``training``.
        """
        if key is not None and not training:
            raise ValueError("key is for noise and dropout in training: give training=True, too.")
        noise, dropout = (None, None) if key is None else jax.random.split(key)
        options, rows = self.options, x.reshape(-1, x.shape[-1])
        if not training:
            options = dropless(options, len(rows))
        ragged = options.capacity_factor is None is options.expert_axis and self._grouped()
        y, statistics = mixture_of_experts(
            rows,
            self.router[...],
            lambda rows, sizes: self.experts(rows, sizes, key=dropout),
            options,
            dispatch="ragged" if ragged else "slots",
            key=noise,
            mask=None if mask is None else mask.reshape(-1),
        )
        return y.reshape(*x.shape[:-1], y.shape[-1]), statistics

    def _grouped(self) -> bool:
        """Whether grouped products are faster: on other backends they compute all by all.

        Layers with adapters have a product of their own for slots alone, and JAX has no grouped
        products on explicit axes.
        """
        layers = [x for _, x in nnx.iter_modules(self.experts) if isinstance(x, nnx.Einsum)]
        explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
        return all(map(_takes_groups, layers)) and not explicit and jax.default_backend() == "tpu"
