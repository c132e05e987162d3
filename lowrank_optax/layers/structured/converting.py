"""Linear layers of a model made structured, and structured layers made dense, in place."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, NamedTuple

from flax import nnx

from lowrank_optax.layers.structured.base import Structure
from lowrank_optax.layers.structured.feed_forward_layers import (
    MergedKernel,
    StructuredLinear,
    check_structure,
    layers_outside_factors,
)
from lowrank_optax.matrices.selection import Path, Where, path_string
from lowrank_optax.modules.plain_layers import check_own_kernels, check_plain_layer
from lowrank_optax.modules.report import Report, Table, matrices_string
from lowrank_optax.modules.select import modules_by_path, options_by_path, select
from lowrank_optax.modules.wrap import become

_KIND = "linear layer"


def structure_linears(
    model: nnx.Module,
    structure: Structure | Mapping[str, Structure],
    where: Where = None,
) -> "StructuredSummary":
    """Turn linear layers of a model into `StructuredLinear` layers, in place.

    The factors are those nearest to the layer's kernel: truncated SVDs of its blocks. Biases stay
    as they are. Stacked layers are converted one by one.

    Args:
      model: Any NNX model.
      structure: Structure of all layers, or structures by regular expressions found in their paths,
        of which the first that is found counts.
      where: Layers of type ``nnx.Linear`` to convert: a regular expression found in a path such as
        ``blocks/mlp/up``, a filter of ``flax.nnx`` or a function of path and module. None for those
        in which a pattern of ``structure`` is found, or, with a single structure, all except output
        heads.

    Returns:
      The structured layers of the model; print it.

    Raises:
      ValueError: If ``where`` or a pattern matches no linear layer (the message lists similar
        paths), ``structure`` has no pattern or does not fit a layer, a layer is more than an
        ``nnx.Linear`` (it has adapters, a call, a ``dot_general`` or a ``preferred_element_type``
        of its own, or stack axes that are not in front), or its kernel is shared with another
        layer or not an ``nnx.Param``.
      TypeError: If a structure is not a structure.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> from lowrank_optax.models import Decoder, decoder_config
      >>> model = Decoder(decoder_config("llama-tiny", vocab_size=256), rngs=nnx.Rngs(0))
      >>> print(lro.layers.structure_linears(model, lro.layers.BlockShuffle(4), where="mlp"))
      path             weight           structure               parameters  of dense
      blocks/mlp/down  4 × (344 × 128)  BlockShuffle(blocks=4)      60,416     34.3%
      blocks/mlp/gate  4 × (128 × 344)  BlockShuffle(blocks=4)      60,416     34.3%
      blocks/mlp/up    4 × (128 × 344)  BlockShuffle(blocks=4)      60,416     34.3%

    Reference:
      Dao et al., Monarch, 2022, https://arxiv.org/abs/2204.00595, section 3.2, for `BlockShuffle`.
    """
    by_pattern = isinstance(structure, Mapping)
    if by_pattern and not structure:
        raise ValueError("structure={} has no pattern: give at least one, or a single structure.")
    for each in structure.values() if by_pattern else [structure]:
        check_structure(each)
    layers = linears = layers_outside_factors(model, nnx.Linear)
    if where is not None or not by_pattern:
        layers = select(linears, where, _KIND)
    if by_pattern:
        chosen = options_by_path("structure", layers, structure, _KIND)
    else:
        chosen = dict.fromkeys(layers, structure)
    check_own_kernels({path: layers[path] for path in chosen}, linears)
    for path, own in chosen.items():
        _check_layer(path_string(path), layers[path], own)
    for path, own in chosen.items():
        become(layers[path], _structured(layers[path], own))
    return structured_layers(model)


def merge_structured(model: nnx.Module, where: Where = None) -> nnx.Module:
    """Turn structured layers of a model into ``nnx.Linear`` layers with the same weights, in place.

    Args:
      model: Any NNX model, or a `StructuredLinear` itself.
      where: Structured layers, as for `structure_linears`; None for all.

    Returns:
      The model itself.

    Raises:
      ValueError: If ``where`` matches no structured layer, or a layer has a guide or adapters.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> structure = lro.layers.BlockShuffle(blocks=2)
      >>> layer = lro.layers.StructuredLinear(8, 16, structure, rngs=nnx.Rngs(0))
      >>> type(lro.layers.merge_structured(layer)).__name__, layer.kernel.shape
      ('Linear', (8, 16))
    """
    layers = _chosen(model, where)
    for path, layer in layers.items():
        _check_plain(path_string(path), layer)
    for layer in layers.values():
        become(layer, _dense(layer))
    return model


def keep_merged(model: nnx.Module, where: Where = None, *, rows: int = 16) -> nnx.Module:
    """Keep the dense weights of structured layers beside their factors, for decoding, in place.

    A call with few rows (tokens) is limited by launches and by reading weights; then one dense
    product is faster than two small ones. Call it after training: the weights do not follow the
    factors, so a gradient through such a layer is refused.

    Args:
      model: Any NNX model, or a `StructuredLinear` itself.
      where: Structured layers, as for `structure_linears`; None for all.
      rows: Number of rows, over all axes but the last, up to which a call takes the dense weight;
        0 removes the dense weights.

    Returns:
      The model itself.

    Raises:
      ValueError: If ``where`` matches no structured layer, a layer has a guide or adapters, or
        ``rows`` is negative or not an integer.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> structure = lro.layers.BlockShuffle(blocks=2)
      >>> layer = lro.layers.StructuredLinear(8, 16, structure, rngs=nnx.Rngs(0))
      >>> lro.layers.keep_merged(layer, rows=4).merged.shape
      (8, 16)

    Reference:
      Wei et al., 2024, https://arxiv.org/abs/2406.16450, on inference.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
        raise ValueError(f"rows must be an integer of at least 0, got {rows!r}.")
    layers = _chosen(model, where)
    for path, layer in layers.items():
        _check_plain(path_string(path), layer)
    for layer in layers.values():
        layer.merged = MergedKernel(layer.kernel()) if rows else nnx.data(None)
        layer.merged_rows = rows
    return model


class StructuredLayer(NamedTuple):
    """A structured layer, or a stack of layers.

    Attributes:
      path: Path of the layer, such as ``blocks/mlp/up``.
      weight: Weights as a batch of matrices, inputs × outputs: ``4 × (512 × 1376)``.
      structure: What they are products of.
      parameters: Number of elements of the factors.
      share: The same, divided by the number of elements of the dense weights.
    """

    path: str
    weight: str
    structure: Structure
    parameters: int
    share: float


@dataclasses.dataclass(frozen=True, repr=False)
class StructuredSummary(Report):
    """The structured layers of a model; prints as a table.

    Attributes:
      rows: One `StructuredLayer` per layer, or stack of layers.
    """

    rows: list[StructuredLayer]

    def table(self) -> Table:
        """One row per layer."""
        columns = ("path", "weight", "structure", ">parameters", ">of dense")
        cells = [
            (*row[:2], str(row.structure), row.parameters, f"{row.share:.1%}") for row in self.rows
        ]
        return Table(columns, cells)


def structured_layers(model: nnx.Module) -> StructuredSummary:
    """Return the structured layers of a model: print it, or read its ``rows``."""
    rows = []
    for path, layer in _structured_modules(model).items():
        shape = (*layer.stack(), layer.in_features, layer.out_features)
        count = sum(x.size for x in layer.factors())
        share = count / math.prod(shape)
        names = path_string(path), matrices_string(shape)
        rows.append(StructuredLayer(*names, layer.structure, count, share))
    return StructuredSummary(rows)


def _structured_modules(model: nnx.Module) -> dict[Path, StructuredLinear]:
    return modules_by_path(model, lambda module: isinstance(module, StructuredLinear))


def _chosen(model: nnx.Module, where: Where) -> dict[Path, StructuredLinear]:
    layers = _structured_modules(model)
    if where is None and layers:
        return layers
    return select(layers, where, "structured layer")


def _structured(layer: nnx.Linear, structure: Structure) -> StructuredLinear:
    """A structured layer with the factors nearest to the kernel of a layer, and its bias."""
    make = lambda: StructuredLinear(*_sides(layer), structure, **_options(layer))
    new = nnx.eval_shape(make)
    first, second = structure.project(layer.kernel[...])
    new.first.kernel = nnx.Param(first.astype(layer.kernel.dtype))
    new.second.kernel = nnx.Param(second.astype(layer.kernel.dtype))
    _set_bias(new, layer)
    return new


def _dense(layer: StructuredLinear) -> nnx.Linear:
    new = nnx.eval_shape(lambda: nnx.Linear(*_sides(layer), **_options(layer)))
    new.kernel = nnx.Param(layer.kernel())
    _set_bias(new, layer)
    return new


def _sides(layer: Any) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def _options(layer: Any) -> dict[str, Any]:
    """The arguments of a layer that its dense and its structured counterpart share."""
    names = ("dtype", "param_dtype", "precision")
    same = {name: getattr(layer, name) for name in names}
    return {"use_bias": layer.bias is not None, "rngs": nnx.Rngs(0), **same}


def _set_bias(new: Any, layer: Any) -> None:
    if layer.bias is not None:
        new.bias = nnx.Param(layer.bias[...])


def _check_layer(path: str, layer: Any, structure: Structure) -> None:
    """Raises ValueError if a layer is more than an ``nnx.Linear``, or the structure misfits."""
    check_plain_layer(path, layer)
    try:
        structure.shapes(*_sides(layer))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_plain(path: str, layer: StructuredLinear) -> None:
    """Raises ValueError if the factors are not all that the layer computes."""
    if layer.guide is not None:
        raise ValueError(f"{path} has a guide: drop_guides(model) first.")
    layer.check_unadapted(path)
