"""Structured layers in Flax NNX: one linear layer, and the feed-forward of two."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.layers.structured.base import Structure
from lowrank_optax.layers.structured.factors import Factors
from lowrank_optax.matrices.arithmetic import branch
from lowrank_optax.matrices.selection import Path
from lowrank_optax.modules.select import modules_by_path


class GuideVariable(nnx.Variable):
    """The weight of a guide, or the key that decides whether it is skipped."""


class MergedKernel(nnx.Variable):
    """The dense weight of a structured layer, beside its factors."""


class FactoredLayer(nnx.Module):
    """A layer whose weight is the product of layers inside, which are not converted themselves."""

    in_features: int

    def check_inputs(self, x: jax.Array) -> None:
        """Raises ValueError if inputs have another width."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"x has shape {x.shape}; its last axis must have in_features={self.in_features}."
            )


class StructuredLinear(FactoredLayer):
    """A linear layer whose weight is the product of two factors.

    The factors are layers of their own, ``first`` and ``second`` (``nnx.Linear`` or
    ``nnx.Einsum``), so optimizers see them as batches of matrices and adapters attach to each.

    A layer with a guide computes ``a x G + (1 - a) structured(x)`` with a dense kernel ``G`` that
    starts as the product of the factors; `set_guide_weight` gives it ``a`` before each call, and
    `drop_guides` removes ``G``.

    Args:
      in_features: Number of inputs ``N``.
      out_features: Number of outputs ``M``.
      structure: `LowRank`, `BlockDense` or `BlockShuffle`.
      use_bias: Whether there is a bias ``[M]``, zero at the start.
      guide: Whether there is a dense guide ``[N, M]``.
      initializer_range: Standard deviation of the dense weight that `LowRank` starts from.
      dtype: Dtype of the products and the output; None promotes inputs and parameters.
      param_dtype: Dtype of the parameters.
      precision: Precision of the products, as for ``nnx.Linear``.
      rngs: Random keys for the initial factors.

    Attributes:
      first: The factor ``V``.
      second: The factor ``U``.
      guide: The guide, an ``nnx.Linear`` without bias, or None.
      bias: The bias, or None.

    Raises:
      TypeError: If ``structure`` is not a structure.
      ValueError: If it does not fit a weight of this size; when called, if the input has another
        width, the guide has no weight, or a layer with a merged weight is differentiated or has
        adapters.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> structure = lro.layers.BlockShuffle(blocks=2)
      >>> layer = lro.layers.StructuredLinear(8, 16, structure, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((5, 8))).shape, layer.first.kernel.shape, layer.second.kernel.shape
      ((5, 16), (2, 4, 4), (2, 4, 8))

    Reference:
      Wei et al., 2024, https://arxiv.org/abs/2406.16450.
    """

    guide: nnx.Linear | None
    guide_weight: GuideVariable | None
    guide_key: GuideVariable | None
    merged: MergedKernel | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: Structure,
        *,
        use_bias: bool = True,
        guide: bool = False,
        initializer_range: float = 0.02,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        check_structure(structure)
        options = {"initializer_range": initializer_range, "dtype": param_dtype}
        factors = structure.init(rngs.params(), in_features, out_features, **options)
        self.in_features, self.out_features = in_features, out_features
        self.structure, self.dtype, self.param_dtype = structure, dtype, param_dtype
        self.precision = precision
        self.first = self._factor_layer(structure.equations[0], factors.first)
        self.second = self._factor_layer(structure.equations[1], factors.second)
        self.guide = nnx.data(None)
        self.guide_weight, self.guide_key = nnx.data(None), nnx.data(None)
        self.merged, self.merged_rows = nnx.data(None), 0
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if use_bias else nnx.data(None)
        if guide:
            self.add_guide()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs ``[..., M]`` of inputs ``[..., N]``."""
        self.check_inputs(x)
        rows = x.reshape(-1, self.in_features)
        if self.merged is not None and len(rows) <= self.merged_rows:
            y = self._dense(rows, self.merged[...])
        elif self.guide is None:
            y = self._structured(rows)
        else:
            y = self._guided(rows, self.guide)
        if self.merged is not None:
            self.check_unadapted("the layer")
            y = _for_inference(y, self.factors())
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def factors(self) -> Factors:
        """The factors' arrays, stacked if the layer is."""
        return Factors(self.first.kernel[...], self.second.kernel[...])

    def kernel(self) -> jax.Array:
        """The weight ``[..., N, M]`` that the factors make, in the parameters' dtype."""
        return self.structure.compose(self.factors()).astype(self.param_dtype)

    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading axes of the parameters of stacked layers."""
        own = len(self.structure.shapes(self.in_features, self.out_features)[0])
        shape = self.first.kernel.shape
        return tuple(shape[: len(shape) - own])

    def check_unadapted(self, path: str) -> None:
        """Raises ValueError if the factors have adapters."""
        plain = (nnx.Linear, nnx.Einsum)
        if type(self.first) not in plain or type(self.second) not in plain:
            raise ValueError(
                f"the factors of {path} have adapters, which a dense weight lacks: merge and "
                "detach them first, or remove the weight with keep_merged(model, rows=0)."
            )

    def add_guide(self) -> None:
        """Adds the guide, with which the layer computes what it did at a weight of 1."""
        kernel = self.kernel()
        self.guide = nnx.Linear(*kernel.shape[-2:], use_bias=False, **self._options())
        self.guide.kernel = nnx.Param(kernel)

    def _factor_layer(self, equation: str | None, value: jax.Array) -> nnx.Linear | nnx.Einsum:
        if equation is None:
            layer = nnx.Linear(*value.shape, use_bias=False, **self._options())
        else:
            layer = nnx.Einsum(equation, value.shape, **self._options())
        layer.kernel = nnx.Param(value)
        return layer

    def _options(self) -> dict[str, Any]:
        """Arguments of the layers inside, whose kernels are put in afterwards."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "precision": self.precision}
        return {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0), **types}

    def _structured(self, rows: jax.Array) -> jax.Array:
        return self.structure.through(rows, self.first, self.second)

    def _dense(self, rows: jax.Array, kernel: jax.Array) -> jax.Array:
        dtype = self.dtype or jnp.result_type(rows, kernel)
        return jnp.matmul(rows.astype(dtype), kernel.astype(dtype), precision=self.precision)

    def _guided(self, rows: jax.Array, guide: nnx.Linear) -> jax.Array:
        if self.guide_weight is None:
            raise ValueError(
                "the layer has a guide, whose weight must be given before each call: "
                "set_guide_weight(model, weight), or remove the guide with drop_guides(model)."
            )
        weight = self.guide_weight[...]

        def mixed() -> jax.Array:
            structured = self._structured(rows)
            # In float32: bfloat16 would round weights near 1 to 1, and stop the factors.
            mix = weight * guide(rows) + (1 - weight) * structured
            return mix.astype(structured.dtype)

        if self.guide_key is None:
            return mixed()
        is_guided = jax.random.uniform(self.guide_key[...]) < weight
        return branch(is_guided, mixed, lambda: self._structured(rows))


class StructuredFFN(nnx.Module):
    """The feed-forward of a transformer block, of two structured layers.

    It computes ``second(activation(first(x)))``.

    Args:
      features: Width of inputs and outputs.
      hidden_features: Width between the two layers.
      structure: Structure of both weights, `LowRank`, `BlockDense` or `BlockShuffle`.
      activation: Function of the hidden units; the default is GELU by its tanh formula.
      rngs: Random keys for the initial factors.
      **options: Other arguments of `StructuredLinear`, for both layers.

    Raises:
      TypeError: If ``structure`` is not a structure.
      ValueError: If it does not fit a weight of one of these sizes.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> ffn = lro.layers.StructuredFFN(64, 256, lro.layers.LowRank(16), rngs=nnx.Rngs(0))
      >>> ffn(jnp.ones((2, 7, 64))).shape
      (2, 7, 64)

    Reference:
      Wei et al., 2024, https://arxiv.org/abs/2406.16450.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        structure: Structure,
        *,
        activation: Callable[[jax.Array], jax.Array] = nnx.gelu,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        self.activation = activation
        make = StructuredLinear
        self.first = make(features, hidden_features, structure, rngs=rngs, **options)
        self.second = make(hidden_features, features, structure, rngs=rngs, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs ``[..., features]`` of inputs of that shape."""
        return self.second(self.activation(self.first(x)))


@jax.custom_jvp
def _for_inference(y: jax.Array, factors: Factors) -> jax.Array:
    """The outputs of a layer with a merged weight, which must not be differentiated."""
    del factors  # not in the outputs of the merged weight, where their gradient would be zero
    return y


@_for_inference.defjvp
def _refuse_gradient(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "a structured layer with a merged weight cannot be trained, because the weight does not "
        "follow the factors: remove it with keep_merged(model, rows=0) first."
    )


def layers_outside_factors(model: nnx.Module, types: Any) -> dict[Path, Any]:
    """The layers of these types by path, without the factors of other layers."""
    inside = set(modules_by_path(model, lambda module: isinstance(module, FactoredLayer)))
    layers = modules_by_path(model, lambda module: isinstance(module, types))
    return {path: layer for path, layer in layers.items() if path[:-1] not in inside}


def check_structure(structure: Structure) -> None:
    """Raises TypeError unless this is a structure."""
    if not isinstance(structure, Structure) or type(structure) is Structure:
        raise TypeError(
            f"structure={structure!r} must be a LowRank, BlockDense or BlockShuffle, such as "
            "lro.layers.BlockShuffle(blocks=4)."
        )
