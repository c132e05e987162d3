"""Turning the layers of an NNX model into fixed-point layers, in place, by pattern."""

import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from lowrank_optax.layers.fixed_point.formats import FixedPointFormat
from lowrank_optax.layers.fixed_point.quantized_layers import (
    FixedPointConv,
    FixedPointLinear,
    FixedPointNorm,
    FixedPointQuantizer,
    FixedPointSum,
    LayerFormats,
)
from lowrank_optax.layers.fixed_point.ranges import StartRule, check_rule, choose_integer_bits
from lowrank_optax.matrices.selection import Path, Where, path_string
from lowrank_optax.modules.plain_layers import check_plain_layer
from lowrank_optax.modules.report import Report, Table
from lowrank_optax.modules.select import modules_by_path, select
from lowrank_optax.modules.wrap import set_own_class

QUANTIZERS = ("input_quantizer", "weight_quantizer", "bias_quantizer", "output_quantizer")
_FIXED = {nnx.Linear: FixedPointLinear, nnx.Conv: FixedPointConv, nnx.BatchNorm: FixedPointNorm}
FIXED_POINT_LAYERS = (*_FIXED.values(), FixedPointSum)


def convert_to_fixed_point(
    model: nnx.Module,
    formats: int | LayerFormats,
    where: Where = None,
    *,
    rule: StartRule = "mse",
    per_channel: bool = False,
) -> "FixedPointSummary":
    """Turn layers of a model into fixed-point layers, in place.

    A layer stays the object it is, with its weights and their paths, and gets quantizers beside
    them. Those of weights start from the weights' values; those of inputs and outputs have no
    binary point before `calibrate_fixed_point` gives them one. The statistics of an
    ``nnx.BatchNorm`` are folded into its scale and bias and removed. A layer that is converted
    again gets the new formats and starts again.

    Args:
      model: Any NNX model.
      formats: Word length of all tensors, rounded to the nearest and saturated; or their formats.
      where: Layers of type ``nnx.Linear``, ``nnx.Conv``, ``nnx.BatchNorm`` or `FixedPointSum`: a
        regular expression found in a path such as ``blocks/mlp/up``, a filter of ``flax.nnx`` or a
        function of path and module. None for all except embeddings and output heads.
      rule: How binary points of weights start, see `choose_integer_bits`.
      per_channel: Whether each output channel of a weight gets a binary point.

    Returns:
      The fixed-point layers of the model; print it.

    Raises:
      ValueError: If ``where`` matches no such layer (the message lists similar paths), a number of
        bits is out of range, weights are not finite, or a layer cannot be converted: it has a call
        or product of its own, adapters, a mask, statistics along another axis than the last, or is
        a stack along another axis than the first. The model is then as it was.
      TypeError: If ``formats`` has another type.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
      >>> print(lro.layers.convert_to_fixed_point(layer, 8))
      path      layer   input  weight  bias  output
      layers/0  Linear      8       8     8       8
      >>> print(lro.layers.calibrate_fixed_point(layer, lambda m, x: m(x), jnp.ones((2, 3))))
      4 binary points in 1 layer
      >>> layer(jnp.ones((2, 3))).shape
      (2, 4)

    Reference:
      Dai et al., 2024, https://arxiv.org/abs/2401.17544.
    """
    formats = _layer_formats(formats)
    check_rule(rule, formats.weight)
    layers = modules_by_path(model, lambda module: isinstance(module, (*_FIXED, FixedPointSum)))
    chosen = select(layers, where, "linear layer, convolution, batch norm or FixedPointSum")
    for path, layer in chosen.items():
        _check_layer(path_string(path), layer)
    attributes = [
        _converted(path_string(path), layer, formats, rule, per_channel)
        for path, layer in chosen.items()
    ]
    # Not before all are made: a layer that is refused leaves the model as it was.
    for layer, each in zip(chosen.values(), attributes, strict=True):
        if type(layer) is nnx.BatchNorm:
            del layer.mean, layer.var
        if type(layer) in _FIXED:
            set_own_class(layer, _FIXED[type(layer)])
        for name, value in each.items():
            setattr(layer, name, value)
    return fixed_point_layers(model)


def _layer_formats(formats: Any) -> LayerFormats:
    if isinstance(formats, LayerFormats):
        return formats
    if not isinstance(formats, int) or isinstance(formats, bool):
        raise TypeError(f"formats={formats!r} must be a number of bits or LayerFormats.")
    number = FixedPointFormat(formats)
    return LayerFormats(number, number, number, number)


def _check_layer(name: str, layer: Any) -> None:
    """Raise ValueError if a layer cannot be converted."""
    if isinstance(layer, nnx.Linear | nnx.Conv):
        check_plain_layer(name, layer, FIXED_POINT_LAYERS)
    elif type(layer) not in (nnx.BatchNorm, *FIXED_POINT_LAYERS):
        raise ValueError(
            f"{name} has adapters, or a call of its own, of {type(layer).__name__}: convert plain "
            "layers, or leave it out by where."
        )
    elif type(layer) is nnx.BatchNorm and layer.axis not in (-1, (-1,)):
        raise ValueError(
            f"{name} normalizes along axis {layer.axis}, and a fixed-point layer along the last: "
            "set axis=-1, or leave it out by where."
        )


def _converted(
    name: str, layer: Any, formats: LayerFormats, rule: Any, per_channel: bool
) -> dict[str, Any]:
    """The attributes that a layer gets; it is not changed yet."""
    if isinstance(layer, FixedPointSum):
        shape = layer.output_quantizer.integer_bits.shape
        return {"output_quantizer": _unknown(formats.output, shape)}
    is_norm = isinstance(layer, nnx.BatchNorm)
    if is_norm:
        parts = _folded(layer) if type(layer) is nnx.BatchNorm else {}
        weight, bias = parts.get("scale", layer.scale), parts.get("bias", layer.bias)
    else:
        parts, weight, bias = {}, layer.kernel, layer.bias
    ndim = 1 if is_norm else 2 + len(getattr(layer, "kernel_size", ()))
    stack = weight.shape[: weight.ndim - ndim]

    def start(which: str, x: Any, format: FixedPointFormat) -> FixedPointQuantizer:
        # One number in each channel of a scale or bias is a number too few to choose by.
        several = per_channel and x.ndim - len(stack) > 1
        try:
            return FixedPointQuantizer(format, _start(x, len(stack), format, rule, several))
        except ValueError as error:
            raise ValueError(f"the {which} of {name}: {error}") from None

    kernel = start("scale" if is_norm else "kernel", weight[...], formats.weight)
    return parts | {
        "weight_quantizer": kernel,
        "bias_quantizer": nnx.data(bias and start("bias", bias[...], formats.bias)),
        "input_quantizer": _unknown(formats.input, stack),
        "output_quantizer": _unknown(formats.output, stack),
    }


def _start(x: jax.Array, stack: int, format: FixedPointFormat, rule: Any, several: bool) -> Any:
    lead = x.shape[:stack]
    layers = x.reshape(-1, *x.shape[stack:])
    found = [choose_integer_bits(each, format, rule, per_channel=several) for each in layers]
    return jnp.stack(found).reshape(*lead, *found[0].shape)


def _unknown(format: FixedPointFormat | None, shape: tuple[int, ...]) -> FixedPointQuantizer:
    return FixedPointQuantizer(format, jnp.full(shape, jnp.nan))


def _folded(layer: Any) -> dict[str, Any]:
    """Scale and bias with the running statistics in them."""
    mean, variance = layer.mean[...], layer.var[...]
    scale = jax.lax.rsqrt(variance + layer.epsilon)
    if layer.scale is not None:
        scale = scale * layer.scale[...]
    bias = -mean * scale
    if layer.bias is not None:
        bias = bias + layer.bias[...]
    return {"scale": nnx.Param(scale), "bias": nnx.Param(bias)}


def fixed_point_modules(model: Any) -> dict[Path, Any]:
    """The fixed-point layers and single quantizers of a model, by path; shared ones once."""
    found = modules_by_path(
        model, lambda m: isinstance(m, (*FIXED_POINT_LAYERS, FixedPointQuantizer))
    )
    of_layers = {id(getattr(m, name, None)) for m in found.values() for name in QUANTIZERS}
    return {path: module for path, module in found.items() if id(module) not in of_layers}


def quantizers(model: Any) -> dict[Path, FixedPointQuantizer]:
    """The quantizers of a model that have a format, by path; shared ones once."""
    means = lambda module: isinstance(module, FixedPointQuantizer) and module.format is not None
    return modules_by_path(model, means)


class FixedPointLayer(NamedTuple):
    """A fixed-point layer, or a stack of layers.

    Attributes:
      path: Path of the layer, such as ``blocks/mlp/up``.
      kind: ``"Linear"``, ``"Conv"``, ``"Norm"``, ``"Sum"`` or ``"Quantizer"``.
      formats: Formats by ``"input"``, ``"weight"``, ``"bias"`` and ``"output"``, without those that
        it does not have.
    """

    path: str
    kind: str
    formats: dict[str, FixedPointFormat]


@dataclasses.dataclass(frozen=True, repr=False)
class FixedPointSummary(Report):
    """The fixed-point layers of a model; prints as a table.

    Attributes:
      rows: One `FixedPointLayer` per layer, or stack of layers.
      in_float: Paths of the other modules that have parameters of their own.
    """

    rows: list[FixedPointLayer]
    in_float: list[str]

    def table(self) -> Table:
        """One row per layer, with the bits of its tensors."""
        names = ("input", "weight", "bias", "output")
        bits = lambda row: [row.formats[n].bits if n in row.formats else None for n in names]
        rows = [(row.path, row.kind, *bits(row)) for row in self.rows]
        notes = f"in float: {', '.join(self.in_float)}" if self.in_float else ""
        return Table(("path", "layer", *(f">{name}" for name in names)), rows, notes=notes)


def fixed_point_layers(model: nnx.Module) -> FixedPointSummary:
    """Return the fixed-point layers of a model: print it, or read its ``rows``."""
    rows = []
    for path, layer in fixed_point_modules(model).items():
        kind = next(c.__name__ for c in type(layer).__mro__ if c.__name__.startswith("FixedPoint"))
        found = {name: formats_of(layer, name) for name in QUANTIZERS}
        formats = {name.removesuffix("_quantizer"): f for name, f in found.items() if f}
        rows.append(FixedPointLayer(path_string(path), kind.removeprefix("FixedPoint"), formats))
    has_weights = lambda m: any(isinstance(x, nnx.Param) for x in vars(m).values())
    others = lambda m: (
        has_weights(m) and not isinstance(m, (*FIXED_POINT_LAYERS, FixedPointQuantizer))
    )
    in_float = [path_string(path) for path in modules_by_path(model, others)]
    return FixedPointSummary(rows, in_float)


def formats_of(layer: Any, name: str) -> FixedPointFormat | None:
    """The format of one of a layer's quantizers; a quantizer alone counts as its output."""
    if isinstance(layer, FixedPointQuantizer):
        return layer.format if name == "output_quantizer" else None
    quantizer = getattr(layer, name, None)
    return None if quantizer is None else quantizer.format
