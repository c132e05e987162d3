"""Maestro's layers in Flax NNX: linear layers and convolutions made of ordered directions."""

from collections.abc import Sequence
import math
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.layers.maestro.ordered import is_static
from lowrank_optax.layers.maestro.ordered_layer import MaestroLayer, from_dense, shared_options

_DEFAULT_INIT = nnx.initializers.lecun_normal()  # that of nnx.Linear and nnx.Conv


class MaestroLinear(MaestroLayer):
    """A linear layer with ordered directions, which finds its own rank in training.

    Factors start as the spectral split of a dense kernel ``U S Vᵀ``: ``A = U √S`` and
    ``B = √S Vᵀ``. Each is a layer of its own, ``ordered_in`` and ``ordered_out``.

    In Linen, ``nnx.bridge.to_linen(MaestroLinear, 8, 16)`` has the current rank in the collection
    ``Rank``; a step passes sampled ranks in its place.

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
        sides, options = (linear.in_features, linear.out_features), shared_options(linear)
        new = nnx.eval_shape(lambda: cls(*sides, rank, **options, rngs=nnx.Rngs(0)))
        return from_dense(new, linear)

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
        options = shared_options(conv) | {name: getattr(conv, name) for name in _CONV_OPTIONS}
        sizes = conv.in_features, conv.out_features, conv.kernel_size
        new = nnx.eval_shape(lambda: cls(*sizes, rank, **options, rngs=nnx.Rngs(0)))
        return from_dense(new, conv)

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
