"""What Maestro's layers in Flax NNX have in common."""

import copy
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from lowrank_optax.layers.maestro.ordered import check_prefix, is_static, keep_prefix
from lowrank_optax.layers.structured.factors import (
    Factors,
    in_float32,
    low_rank_factors,
    product,
)
from lowrank_optax.layers.structured.feed_forward_layers import FactoredLayer


class Rank(nnx.Variable):
    """The current rank of a layer, int32."""


class SampledRank(nnx.Variable):
    """The rank that a layer uses in this step, int32."""


class MaestroLayer(FactoredLayer):
    """A layer whose weight is the product of two factors with ordered directions.

    A call uses the first directions only: as many as `set_ranks` has given the layer for this step,
    else its current rank.

    Attributes:
      ordered_in: The factor ``A``, a layer from the inputs to ``R`` directions.
      ordered_out: The factor ``B``, an ``nnx.Linear`` from these to the outputs.
      bias: The bias ``[M]``, or None.
      rank: Current rank, an int32 variable of at most ``R``; stacked layers have one each.
      sampled_rank: Rank in this step, or None.
    """

    out_features: int
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    precision: Any
    ordered_in: nnx.Linear | nnx.Conv
    ordered_out: nnx.Linear
    bias: nnx.Param | None
    rank: Rank
    sampled_rank: SampledRank | None

    def __call__(self, x: jax.Array, rank: ArrayLike | None = None) -> jax.Array:
        """Compute the outputs ``[..., M]`` from inputs ``[..., N]``.

        Args:
          x: Inputs.
          rank: Number of directions to use instead of the current rank: an int32 scalar that may be
            traced and is clipped to 0 and ``R``, or a Python integer, with which the others cost
            nothing.
        """
        self.check_inputs(x)
        if rank is None:
            rank = (self.rank if self.sampled_rank is None else self.sampled_rank)[...]
        check_prefix(rank, self.width())
        inward, outward = self.ordered_in, self.ordered_out
        if is_static(rank) and rank and self.is_plain():
            inward, outward = (_part(layer, rank, i) for i, layer in enumerate(self._layers()))
        y = outward(keep_prefix(inward(x), rank))
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def factors(self) -> Factors:
        """The factors ``A [..., N, R]`` and ``B [..., R, M]``, as matrices; stacked if it is."""
        a, b = self.ordered_in.kernel[...], self.ordered_out.kernel[...]
        stack = b.shape[:-2]
        inputs = math.prod(a.shape[len(stack) : -1])
        return Factors(a.reshape(*stack, inputs, a.shape[-1]), b)

    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack axes, in front."""
        return self.ordered_out.kernel.shape[:-2]

    def width(self) -> int:
        """The number ``R`` of directions that the arrays have."""
        return self.ordered_out.kernel.shape[-2]

    def kernel(self) -> jax.Array:
        """The weight at the current rank, in the shape of the dense layer's kernel."""
        weight = self.matrix()
        return weight.reshape(*weight.shape[:-2], *self.kernel_shape()).astype(self.param_dtype)

    def matrix(self) -> jax.Array:
        """The weight ``[..., N, M]`` at the current rank, in float32 at least."""
        a, b = map(in_float32, self.factors())
        return product("...nr,...rm->...nm", keep_prefix(a, self.rank[..., None, None]), b)

    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the kernel of the dense layer, not stacked."""
        raise NotImplementedError

    def dense(self) -> nnx.Linear | nnx.Conv:
        """The dense layer with the same weight and bias."""
        new = nnx.eval_shape(lambda: self._dense(self.out_features, use_bias=self.bias is not None))
        new.kernel = nnx.Param(self.kernel())
        if self.bias is not None:
            new.bias = nnx.Param(self.bias[...])
        return new

    def set_factors(self, factors: Factors, rank: jax.Array) -> None:
        """Replaces the factors, given as matrices, and the current rank."""
        a, b = (x.astype(self.param_dtype) for x in factors)
        stack, width = b.shape[:-2], b.shape[-2]
        outward = lambda: nnx.Linear(width, self.out_features, **self._options(use_bias=False))
        self.ordered_in = nnx.eval_shape(lambda: self._dense(width, use_bias=False))
        self.ordered_in.kernel = nnx.Param(a.reshape(*stack, *self.kernel_shape()[:-1], width))
        self.ordered_out = nnx.eval_shape(outward)
        self.ordered_out.kernel = nnx.Param(b)
        self.set_rank(rank)

    def set_rank(self, rank: jax.Array) -> None:
        """Replaces the current rank, which the next call then uses: no sampled rank is left."""
        self.rank, self.sampled_rank = Rank(rank.astype(jnp.int32)), nnx.data(None)

    def is_plain(self) -> bool:
        """Whether the factors are all that the layer computes: they have no adapters."""
        return all(type(layer) in (nnx.Linear, nnx.Conv) for layer in self._layers())

    def _layers(self) -> tuple[nnx.Linear | nnx.Conv, nnx.Linear]:
        return self.ordered_in, self.ordered_out

    def _dense(self, features: int, *, use_bias: bool) -> nnx.Linear | nnx.Conv:
        """A dense layer of this kind, from the inputs to a number of features."""
        raise NotImplementedError

    def _options(self, *, use_bias: bool) -> Any:
        """Arguments of the layers inside, whose arrays are put in afterwards."""
        return shared_options(self) | {"use_bias": use_bias, "rngs": nnx.Rngs(0)}

    def _start(self, kernel: jax.Array, use_bias: bool, rank: int) -> None:
        """The initial arrays: a spectral split, and a bias of zeros."""
        matrix = kernel.reshape(-1, self.out_features)
        self.set_factors(low_rank_factors(matrix, rank), jnp.asarray(rank))
        zeros = jnp.zeros(self.out_features, self.param_dtype)
        self.bias = nnx.Param(zeros) if use_bias else nnx.data(None)


def shared_options(layer: Any) -> dict[str, Any]:
    """Arguments of a layer that all kinds of layers share, but for random keys."""
    names = ("dtype", "param_dtype", "precision")
    has_bias = getattr(layer, "bias", None) is not None
    return {"use_bias": has_bias, **{name: getattr(layer, name) for name in names}}


def from_dense(new: Any, layer: nnx.Linear | nnx.Conv) -> Any:
    """A layer without arrays, with the spectral split of the kernel of a dense one and its bias."""
    kernel, width = layer.kernel[...], new.width()
    stack = kernel.shape[: kernel.ndim - len(new.kernel_shape())]
    inputs = math.prod(new.kernel_shape()[:-1])
    matrix = kernel.reshape(*stack, inputs, new.out_features)
    new.set_factors(low_rank_factors(matrix, width), jnp.full(stack, width))
    if layer.bias is not None:
        new.bias = nnx.Param(layer.bias[...])
    return new


def _part(layer: Any, rank: int, index: int) -> Any:
    """A factor's layer with the first directions of its kernel alone."""
    part, kernel = copy.copy(layer), layer.kernel[...]
    kernel = kernel[:rank] if index else kernel[..., :rank]
    # Not setattr: NNX would refuse it if the layer belongs to an enclosing trace.
    vars(part)["kernel"] = layer.kernel.replace(kernel)
    return part
