"""The integers of a model's fixed-point layers."""

from pathlib import Path
from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.fixed_point.convert import FIXED_POINT_LAYERS, fixed_point_modules
from lowrank_optax.layers.fixed_point.integer_files import write_layers
from lowrank_optax.layers.fixed_point.integers import (
    Cast,
    IntegerArray,
    IntegerLayer,
    IntegerLayers,
)
from lowrank_optax.layers.fixed_point.quantized_layers import (
    FixedPointConv,
    FixedPointLinear,
    FixedPointNorm,
    FixedPointQuantizer,
    FixedPointSum,
)
from lowrank_optax.layers.fixed_point.quantizer import check_integer_bits, quantize_fixed_point
from lowrank_optax.matrices.selection import path_string


def to_integers(model: nnx.Module) -> IntegerLayers:
    """Return the fixed-point layers of a model as layers that compute in integers alone.

    The results are those of the JAX layers, bit for bit, while the sums inside a layer fit into
    float32's 24 bits; `IntegerLayer.accumulate` returns these sums.

    Args:
      model: NNX model with fixed-point layers. Layers of a stack are exported one by one, with
        their index behind the path: ``blocks/mlp/up/0``.

    Returns:
      The layers by their path.

    Raises:
      ValueError: If there is no fixed-point layer; one is not calibrated, or has adapters or a call
        of its own; or a convolution pads in a way that is not exported (anything but zeros) or
        dilates its input.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro, numpy as np
      >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> summary = lro.layers.convert_to_fixed_point(model, 8)
      >>> x = np.array([[1.5, -2.0, 0.25]], np.float32)
      >>> points = lro.layers.calibrate_fixed_point(model, lambda m, x: m(x), x)
      >>> y = lro.layers.to_integers(model)["layers/0"](lro.layers.IntegerArray([[6, -8, 1]], 2))
      >>> print((np.ldexp(y.integers, -y.fraction_bits) == model(x)).all())
      True
    """
    layers = {}
    for path, module in fixed_point_modules(model).items():
        layers |= _layers(path_string(path), module)
    if not layers:
        raise ValueError(
            f"the {type(model).__name__} has no fixed-point layer: call convert_to_fixed_point."
        )
    return IntegerLayers(layers)


def save_integers(model: nnx.Module, folder: str | Path) -> None:
    """Write the integers of a model's fixed-point layers, to be read by `load_integers`.

    The folder is replaced as a whole; if writing fails, what was there stays. It has two files:

    - ``fixed_point.json``: ``version``; ``sha256`` of the layers, as JSON with sorted keys, and the
      other file; and ``fixed_point_layers``, by path: ``kind``; ``weight`` and ``bias`` with their
      ``fraction_bits``; ``input`` and ``output`` with the fields of `FixedPointFormat` and
      ``integer_bits``; ``options`` of a convolution.
    - ``fixed_point.npz``: integers ``<path>/weight`` and ``<path>/bias``, in JAX's layout.

    Args:
      model: NNX model with fixed-point layers.
      folder: Folder to write; it may exist if it is of this kind, or empty.

    Raises:
      ValueError: As `to_integers`.
      FileExistsError: If the folder holds other things.
    """
    write_layers(to_integers(model), folder)


def _layers(path: str, module: Any) -> dict[str, IntegerLayer]:
    if type(module) not in (*FIXED_POINT_LAYERS, FixedPointQuantizer):
        own = f"a call of its own, of {type(module).__name__}"
        has = "adapters" if hasattr(module, "adapters") else own
        raise ValueError(f"{path} has {has}, which its integers would not have.")
    if isinstance(module, FixedPointLinear | FixedPointConv | FixedPointNorm):
        is_norm = isinstance(module, FixedPointNorm)
        weight = getattr(module, "scale" if is_norm else "kernel")[...]
        options = _convolution_options(path, module) if isinstance(module, FixedPointConv) else {}
        ndim = 1 if is_norm else 2 + len(options.get("strides", ()))
        kind = "norm" if is_norm else ("convolution" if options else "linear")
        stack = weight.shape[: weight.ndim - ndim]
        bias = None if module.bias is None else module.bias[...]
    else:
        kind = "sum" if isinstance(module, FixedPointSum) else "quantizer"
        weight = bias = None
        options = {}
        output = module.output_quantizer if kind == "sum" else module
        stack = output.integer_bits.shape
    found = {}
    for index in np.ndindex(stack):
        name = "/".join([path, *map(str, index)])
        tensor = lambda which, x, i=index, n=name: _tensor(n, module, which, x, i)
        cast = lambda which, i=index, n=name: _cast(n, module, which, i)
        found[name] = IntegerLayer(
            kind,
            tensor("weight", weight),
            tensor("bias", bias),
            cast("input"),
            cast("output"),
            options,
        )
    return found


def _tensor(path: str, module: Any, which: str, x: Any, index: Any) -> IntegerArray | None:
    if x is None:
        return None
    quantizer = getattr(module, f"{which}_quantizer")
    point = _position(f"{path}/{which}", quantizer, index)
    y = quantize_fixed_point(jnp.asarray(x[index], jnp.float32), point, quantizer.format)
    fraction_bits = quantizer.format.bits - point
    integers = np.ldexp(np.asarray(y, np.float64), fraction_bits)
    return IntegerArray(np.rint(integers).astype(np.int64), fraction_bits)


def _cast(path: str, module: Any, which: str, index: Any) -> Cast | None:
    own = module if which == "output" and hasattr(module, "integer_bits") else None
    quantizer = own or getattr(module, f"{which}_quantizer", None)
    if quantizer is None or quantizer.format is None:
        return None
    return Cast(quantizer.format, _position(f"{path}/{which}", quantizer, index))


def _position(name: str, quantizer: Any, index: Any) -> np.ndarray:
    points = np.asarray(quantizer.integer_bits[...][index])
    check_integer_bits(f"integer_bits of {name}", points, quantizer.format)
    return np.rint(points).astype(np.int64)


def _convolution_options(path: str, layer: Any) -> dict[str, Any]:
    """Strides, padding, dilation and groups, as lists that JSON has."""
    rank = len(layer.kernel_size)
    several = lambda x: [x or 1] * rank if x is None or isinstance(x, int) else list(x)
    padding = layer.padding
    if isinstance(padding, int):
        padding = [padding] * rank
    if not isinstance(padding, str):
        padding = [[p, p] if isinstance(p, int) else list(p) for p in padding]
    elif padding not in ("SAME", "VALID"):
        raise ValueError(f"{path} pads {padding!r}: give 'SAME', 'VALID' or numbers of zeros.")
    if several(layer.input_dilation) != [1] * rank:
        raise ValueError(f"{path} dilates its input, which is not exported.")
    return {
        "strides": several(layer.strides),
        "padding": padding,
        "kernel_dilation": several(layer.kernel_dilation),
        "groups": layer.feature_group_count,
    }
