"""Maestro's layers in Flax NNX: linear layers and convolutions made of ordered directions."""

from collections.abc import Sequence
import copy
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from lowrank_optax.layers.maestro.ordered import check_prefix, is_static, keep_prefix
from lowrank_optax.layers.structured.factors import Factors, low_rank_factors, product

_DEFAULT_INIT = nnx.initializers.lecun_normal()  # that of nnx.Linear and nnx.Conv


class Rank(nnx.Variable):
    """The current rank of a layer, int32."""


class SampledRank(nnx.Variable):
    """The rank that a layer uses in this step, int32."""


class MaestroLayer(nnx.Module):
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

    in_features: int
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
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x has shape {x.shape}; its last axis must have in_features={self.in_features}."
            )
        if rank is None:
            rank = (self.rank if self.sampled_rank is None else self.sampled_rank)[...]
        inward, outward = self.ordered_in, self.ordered_out
        if is_static(rank):
            check_prefix(rank, self.width())
            if rank and self.is_plain():
                inward, outward = (_part(layer, rank, i) for i, layer in enumerate(self._layers()))
        y = outward(keep_prefix(inward(x), rank))
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def factors(self) -> Factors:
        """The factors ``A [..., N, R]`` and ``B [..., R, M]``, as matrices; stacked if it is."""
        a, b = self.ordered_in.kernel[...], self.ordered_out.kernel[...]
        stack = b.shape[:-2]
        inputs = math.prod(a.shape[len(stack) : -1])
        return Factors(a.reshape(*stack, inputs, a.shape[-1]), b)

    def width(self) -> int:
        """The number ``R`` of directions that the arrays have."""
        return self.ordered_out.kernel.shape[-2]

    def kernel(self) -> jax.Array:
        """The weight at the current rank, in the shape of the dense layer's kernel."""
        a, b = self.factors()
        weight = product("...nr,...rm->...nm", keep_prefix(a, self.rank[..., None, None]), b)
        return weight.reshape(*b.shape[:-2], *self.kernel_shape()).astype(self.param_dtype)

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
        return _shared_options(self) | {"use_bias": use_bias, "rngs": nnx.Rngs(0)}

    def _start(self, kernel: jax.Array, use_bias: bool, rank: int) -> None:
        """The initial arrays: a spectral split, and a bias of zeros."""
        matrix = kernel.reshape(-1, self.out_features)
        self.set_factors(low_rank_factors(matrix, rank), jnp.asarray(rank))
        zeros = jnp.zeros(self.out_features, self.param_dtype)
        self.bias = nnx.Param(zeros) if use_bias else nnx.data(None)


class MaestroLinear(MaestroLayer):
    """A linear layer with ordered directions, which finds its own rank in training.

    Factors start as the spectral split of a dense kernel ``U S Vᵀ``: ``A = U √S`` and
    ``B = √S Vᵀ``. Each is a layer of its own, ``ordered_in`` and ``ordered_out``.

    Args:
      in_features: Number of inputs ``N``.
      out_features: Number of outputs ``M``.
      rank: Number ``R`` of directions; None for the smaller side, with which nothing is lost.
      use_bias: Whether there is a bias ``[M]``, zero at the start.
      kernel_init: Initializer of the dense kernel.
      dtype: Dtype of the products and the output; None promotes inputs and parameters.
      param_dtype: Dtype of the parameters.
      precision: Precision of the products, as for ``nnx.Linear``.
      rngs: Random keys for the dense kernel.

    Attributes:
      rank: Current rank, an int32 variable, see `maestro.shrink`.

    Raises:
      ValueError: If ``rank`` is not from 1 to the smaller side; when called, if the input has
        another width or a Python integer ``rank`` is not from 0 to ``R``.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.layers.MaestroLinear(8, 16, rngs=nnx.Rngs(0))
      >>> layer.ordered_in.kernel.shape, layer.ordered_out.kernel.shape
      ((8, 8), (8, 16))
      >>> layer(jnp.ones((5, 8)), rank=3).shape
      (5, 16)

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        *,
        use_bias: bool = True,
        kernel_init: nnx.Initializer = _DEFAULT_INIT,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        rank = checked_rank(rank, in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        wide = jnp.promote_types(param_dtype, jnp.float32)
        kernel = kernel_init(rngs.params(), (in_features, out_features), wide)
        self._start(kernel, use_bias, rank)

    @classmethod
    def from_linear(cls, linear: nnx.Linear, rank: int | None = None) -> "MaestroLinear":
        """The layer whose factors are the spectral split of the kernel of a plain layer.

        Args:
          linear: Layer, or a stack of layers.
          rank: As for a new layer; below the smaller side the split is truncated.

        Raises:
          ValueError: If ``rank`` is not from 1 to the smaller side.
        """
        sides, options = (linear.in_features, linear.out_features), _shared_options(linear)
        new = nnx.eval_shape(lambda: cls(*sides, rank, **options, rngs=nnx.Rngs(0)))
        return _from_dense(new, linear)

    def kernel_shape(self) -> tuple[int, ...]:
        """``(N, M)``."""
        return self.in_features, self.out_features

    def _dense(self, features: int, *, use_bias: bool) -> nnx.Linear:
        return nnx.Linear(self.in_features, features, **self._options(use_bias=use_bias))


class MaestroConv(MaestroLayer):
    """A convolution with ordered directions, channels last: see `MaestroLinear`.

    The kernel ``[*kernel_size, in, out]`` is the matrix ``[N, out]`` with ``N`` the product of its
    other sizes. ``ordered_in`` is a convolution to ``R`` channels with the window, strides, padding
    and dilation, and ``ordered_out`` one of size 1 (an ``nnx.Linear``) to the outputs.

    Args:
      in_features: Number of input channels.
      out_features: Number of output channels ``M``.
      kernel_size: Size of the window along each spatial axis.
      rank: Number ``R`` of directions; None for the smaller of ``N`` and ``M``.
      strides: Strides, as for ``nnx.Conv``.
      padding: Padding, as for ``nnx.Conv``.
      input_dilation: Dilation of the input.
      kernel_dilation: Dilation of the window.
      use_bias: Whether there is a bias ``[M]``, zero at the start.
      kernel_init: Initializer of the dense kernel.
      dtype: Dtype of the products and the output; None promotes inputs and parameters.
      param_dtype: Dtype of the parameters.
      precision: Precision of the products, as for ``nnx.Conv``.
      rngs: Random keys for the dense kernel.

    Attributes:
      rank: Current rank, an int32 variable, see `maestro.shrink`.

    Raises:
      ValueError: As `MaestroLinear`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.layers.MaestroConv(3, 16, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> layer.ordered_in.kernel.shape, layer(jnp.ones((5, 8, 8, 3))).shape
      ((3, 3, 3, 16), (5, 4, 4, 16))

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        rank: int | None = None,
        *,
        strides: int | Sequence[int] | None = 1,
        padding: Any = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        use_bias: bool = True,
        kernel_init: nnx.Initializer = _DEFAULT_INIT,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        rank = checked_rank(rank, math.prod(size) * in_features, out_features)
        self.in_features, self.out_features, self.kernel_size = in_features, out_features, size
        self.strides, self.padding = strides, padding
        self.input_dilation, self.kernel_dilation = input_dilation, kernel_dilation
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        wide = jnp.promote_types(param_dtype, jnp.float32)
        kernel = kernel_init(rngs.params(), (*size, in_features, out_features), wide)
        self._start(kernel, use_bias, rank)

    @classmethod
    def from_conv(cls, conv: nnx.Conv, rank: int | None = None) -> "MaestroConv":
        """The layer whose factors are the spectral split of the kernel of a plain layer.

        Args:
          conv: Layer, or a stack of layers.
          rank: As for a new layer; below the smaller side the split is truncated.

        Raises:
          ValueError: If ``rank`` is not from 1 to the smaller side, or the convolution is grouped.
        """
        if conv.feature_group_count != 1:
            raise ValueError(
                f"feature_group_count={conv.feature_group_count} must be 1: the kernel of a "
                "grouped convolution is not one matrix."
            )
        options = _shared_options(conv) | {name: getattr(conv, name) for name in _CONV_OPTIONS}
        sizes = conv.in_features, conv.out_features, conv.kernel_size
        new = nnx.eval_shape(lambda: cls(*sizes, rank, **options, rngs=nnx.Rngs(0)))
        return _from_dense(new, conv)

    def kernel_shape(self) -> tuple[int, ...]:
        """``(*kernel_size, in, out)``."""
        return *self.kernel_size, self.in_features, self.out_features

    def _dense(self, features: int, *, use_bias: bool) -> nnx.Conv:
        window: Any = {name: getattr(self, name) for name in _CONV_OPTIONS}
        options = self._options(use_bias=use_bias)
        return nnx.Conv(self.in_features, features, self.kernel_size, **window, **options)


_CONV_OPTIONS = ("strides", "padding", "input_dilation", "kernel_dilation")


def checked_rank(rank: int | None, inputs: int, outputs: int) -> int:
    """A layer's number of directions; ValueError unless it is from 1 to the smaller side."""
    most = min(inputs, outputs)
    if rank is None:
        return most
    if not is_static(rank) or not 1 <= rank <= most:
        raise ValueError(
            f"rank={rank!r} must be an integer from 1 to {most}, the smaller side of a weight "
            f"{inputs} × {outputs}."
        )
    return rank


def _shared_options(layer: Any) -> dict[str, Any]:
    """Arguments of a layer that all kinds of layers share, but for random keys."""
    names = ("dtype", "param_dtype", "precision")
    has_bias = getattr(layer, "bias", None) is not None
    return {"use_bias": has_bias, **{name: getattr(layer, name) for name in names}}


def _from_dense(new: Any, layer: nnx.Linear | nnx.Conv) -> Any:
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
