"""Fixed-point layers in Flax NNX: each tensor has a quantizer with a trained binary point."""

import copy
import dataclasses
import functools
from typing import Any, cast

from flax import nnx
import jax
import jax.numpy as jnp

from lowrank_optax.layers.fixed_point.formats import FixedPointFormat
from lowrank_optax.layers.fixed_point.quantizer import check_dtype, quantize_fixed_point
from lowrank_optax.layers.fixed_point.ranges import includes_relu, range_statistics


class BinaryPoint(nnx.Param):
    """Position of a binary point, a parameter: float32, the number of bits left of it."""


class FrozenBinaryPoint(nnx.Variable):
    """Position of a binary point that is no longer trained, an integer as float32."""


class RangeStatistics(nnx.Variable):
    """Statistics of a quantizer's input during calibration."""


_EIGHT_BITS = FixedPointFormat(8)


@dataclasses.dataclass(frozen=True)
class LayerFormats:
    """Formats of a fixed-point layer's tensors.

    Products and sums inside a layer are exact. ``input`` or ``output`` may be None: the numbers
    then go in or out as they are, the output with all bits of the sum.

    Args:
      weight: Format of the weight, or of a normalization's scale.
      bias: Format of the bias, or of a normalization's shift.
      input: Format of the input.
      output: Format of the output; ``FixedPointFormat(8, signed=False)`` makes it a ReLU too.

    Raises:
      TypeError: If a format is not a `FixedPointFormat`.
      ValueError: If a format has more than 24 bits, which float32 does not hold.
    """

    weight: FixedPointFormat = _EIGHT_BITS
    bias: FixedPointFormat = _EIGHT_BITS
    input: FixedPointFormat | None = _EIGHT_BITS
    output: FixedPointFormat | None = _EIGHT_BITS

    def __post_init__(self) -> None:
        """Check the formats."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            optional = field.name in ("input", "output")
            if not isinstance(value, FixedPointFormat) and not (optional and value is None):
                raise TypeError(f"{field.name}={value!r} must be a FixedPointFormat.")
            if value is not None:
                check_dtype(f"{field.name}: a layer's arithmetic", jnp.float32, value)


class FixedPointQuantizer(nnx.Module):
    """Quantization of one tensor, with a trained binary point.

    Args:
      format: Word length and modes; None for a quantizer that does nothing yet.
      integer_bits: Start of the binary point, a scalar or ``[channels]``, by default not a number:
        `calibrate_fixed_point` or `choose_integer_bits` gives it one.

    Attributes:
      format: As given.
      integer_bits: The `BinaryPoint`, or a `FrozenBinaryPoint`.

    Raises:
      TypeError: If ``format`` is not a `FixedPointFormat`.
      ValueError: When called, as `quantize_fixed_point`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> quantizer = lro.layers.FixedPointQuantizer(lro.layers.FixedPointFormat(4), 2.0)
      >>> print(quantizer(jnp.array([0.3, 5.0])))
      [0.25 1.75]
    """

    def __init__(self, format: FixedPointFormat | None = None, integer_bits: Any = jnp.nan) -> None:
        if format is not None and not isinstance(format, FixedPointFormat):
            raise TypeError(f"format={format!r} must be a FixedPointFormat.")
        self.format = format
        self.integer_bits: Any = BinaryPoint(jnp.asarray(integer_bits, jnp.float32))
        self.statistics: Any = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Quantize an array; the result has its shape and dtype."""
        if self.format is None:
            return x
        if self.statistics is not None:
            return _observe(x, self.statistics[...], self.format)
        return quantize_fixed_point(x, self.integer_bits[...], self.format)


# The statistics arrive as the gradient of an array of zeros, so that they get out of loops and
# rematerialized blocks, and add up over calls.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _observe(x: jax.Array, statistics: jax.Array, format: FixedPointFormat) -> jax.Array:
    del statistics
    return jnp.maximum(x, 0) if includes_relu(format) else x  # later layers see it, too


def _observe_forward(x: jax.Array, statistics: jax.Array, format: FixedPointFormat) -> Any:
    return _observe(x, statistics, format), range_statistics(x, statistics.shape[:-2], format)


def _observe_backward(format: FixedPointFormat, found: jax.Array, cotangent: jax.Array) -> Any:
    del format
    return cotangent, found


_observe.defvjp(_observe_forward, _observe_backward)


class FixedPointLinear(nnx.Linear):
    """``nnx.Linear`` in fixed point: input, kernel, bias and output are quantized.

    `convert_to_fixed_point` makes these layers of ``nnx.Linear``. Arithmetic is float32 at the
    highest precision, which is exact while sums fit into 24 bits; the output has the dtype that
    ``nnx.Linear`` gives it.

    Attributes:
      input_quantizer: Quantizer of the input; so ``weight_quantizer``, ``bias_quantizer`` (None
        without a bias) and ``output_quantizer``.
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Compute the outputs ``[..., out]`` from inputs ``[..., in]``."""
        return _call(nnx.Linear, self, inputs, out_sharding)


class FixedPointConv(nnx.Conv):
    """``nnx.Conv`` in fixed point: see `FixedPointLinear`."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Compute the outputs ``[..., out]`` from inputs ``[..., in]``."""
        return _call(nnx.Conv, self, inputs, out_sharding)


class FixedPointNorm(nnx.BatchNorm):
    """``nnx.BatchNorm`` with its running statistics folded in, in fixed point.

    It computes ``x * scale + bias`` for the last axis; input, scale, bias and output are quantized.
    `convert_to_fixed_point` folds the statistics into ``scale`` and ``bias``, which stay trainable.
    Attributes are those of `FixedPointLinear`.
    """

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Compute outputs of the inputs' shape; the options of ``nnx.BatchNorm`` do nothing."""
        del use_running_average, mask
        parts = cast(Any, self)
        scale = parts.weight_quantizer(parts.scale[...].astype(jnp.float32))
        shift = parts.bias_quantizer(parts.bias[...].astype(jnp.float32))
        y = parts.input_quantizer(x.astype(jnp.float32)) * scale + shift
        dtype = self.dtype or jnp.result_type(x, parts.scale[...], parts.bias[...])
        return _in_dtype(parts.output_quantizer, y, dtype)


class FixedPointSum(nnx.Module):
    """The sum of a shortcut and a branch; `convert_to_fixed_point` quantizes it.

    Put it where a model adds: ``self.add(x, self.branch(x))``. The terms are used as they are,
    which are fixed-point numbers if other layers made them.

    Attributes:
      output_quantizer: Quantizer of the sum.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> print(lro.layers.FixedPointSum()(jnp.ones(2), jnp.ones(2)))
      [2. 2.]
    """

    def __init__(self) -> None:
        self.output_quantizer = FixedPointQuantizer()

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Add two arrays of one shape."""
        if self.output_quantizer.format is None:
            return x + y
        # In float32: a sum in half precision would be rounded twice.
        total = x.astype(jnp.float32) + y.astype(jnp.float32)
        return _in_dtype(self.output_quantizer, total, jnp.result_type(x, y))


def _call(plain: type, layer: Any, inputs: jax.Array, out_sharding: Any) -> jax.Array:
    """The call of a plain layer with quantized numbers, and its output quantized."""
    arrays = [inputs, layer.kernel[...]]
    quantized = copy.copy(layer)
    # Not setattr: NNX would refuse it if the layer belongs to an enclosing trace.
    kernel = layer.weight_quantizer(layer.kernel[...].astype(jnp.float32))
    vars(quantized)["kernel"] = layer.kernel.replace(kernel)
    if layer.bias is not None:
        arrays.append(layer.bias[...])
        bias = layer.bias_quantizer(layer.bias[...].astype(jnp.float32))
        vars(quantized)["bias"] = layer.bias.replace(bias)
    exact = {"dtype": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    vars(quantized).update(exact)
    x = layer.input_quantizer(inputs.astype(jnp.float32))
    options = () if out_sharding is None else (out_sharding,)
    y = plain.__call__(quantized, x, *options)
    return _in_dtype(layer.output_quantizer, y, layer.dtype or jnp.result_type(*arrays))


def _in_dtype(quantizer: Any, y: jax.Array, dtype: Any) -> jax.Array:
    """The quantized output in a layer's dtype, which has to hold it."""
    if quantizer.format is not None:
        check_dtype("the output", dtype, quantizer.format)
    elif jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"output=None passes the exact sum on, which {jnp.dtype(dtype)} does not hold: give "
            "the output a format, or the layer dtype=jnp.float32."
        )
    return quantizer(y).astype(dtype)
