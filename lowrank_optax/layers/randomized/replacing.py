"""Randomized linear layers in a whole Flax NNX model, and the plain ones again."""

from collections.abc import Mapping
import functools
from typing import Any, TypeAlias

from flax import nnx

from lowrank_optax.compat.flax import set_class
from lowrank_optax.layers.randomized.dot_general import check_dot_general, check_sketch
from lowrank_optax.layers.randomized.nnx import RandomizedLinear, sketch_stream
from lowrank_optax.layers.randomized.sketch import Sketch
from lowrank_optax.layers.randomized.summaries import (
    RandomizedLayer,
    RandomizedSummary,
)
from lowrank_optax.matrices.flax_layers import place, read_layer
from lowrank_optax.matrices.module_classes import made_by
from lowrank_optax.matrices.printing import matrices_string
from lowrank_optax.matrices.rules import is_weight
from lowrank_optax.matrices.selection import Path, Where, matching, near, path_string

Sketches: TypeAlias = Sketch | Mapping[str, Sketch]
"""One sketch for all, or sketches by regular expressions found in the layers' paths, the first
that is found counting."""

_LAYER = "layer that is a nnx.Linear"


def randomize(
    model: nnx.Module, sketch: Sketches, where: Where = None, *, rngs: nnx.Rngs | int
) -> RandomizedSummary:
    """Makes linear layers of a model randomized ones, in place.

    A layer stays the object it is, with its weights and their paths; its class becomes
    `RandomizedLinear`. Layers stacked by ``nnx.vmap`` get a key each. Layers that are randomized
    already get their new sketch and keep their stream of keys, so a run can change sizes on the
    way. Attach adapters afterwards: their layers' kernels are frozen, of which nothing is kept.

    Args:
      model: Any NNX model.
      sketch: For all layers, or by regular expressions found in their paths, the first that is
        found counting: ``{"mlp/down": Sketch(fraction=0.5), "mlp": Sketch(fraction=0.1)}``.
      where: Which layers, of those of type ``nnx.Linear``: a regular expression found in a path
        such as ``blocks/mlp/up``, a filter of ``flax.nnx`` or a function of path and module. None:
        those that a pattern of ``sketch`` is found in, or, for a single sketch, all except
        embeddings and output heads.
      rngs: Of the layers' streams: its stream ``sketch``, or ``default``.

    Returns:
      What is randomized now; print it.

    Raises:
      ValueError: If ``where`` or a pattern matches no linear layer (the message lists near ones),
        or a layer cannot be randomized: it has a call or a ``dot_general`` of its own, adapters, or
        stack axes that are not in front.
      TypeError: If a sketch is none.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> from lowrank_optax.models import Decoder, decoder_config
      >>> model = Decoder(decoder_config("llama-tiny", vocab_size=256), rngs=nnx.Rngs(0))
      >>> sketch = lro.layers.Sketch(fraction=0.125)
      >>> print(lro.layers.randomize(model, sketch, where="mlp", rngs=nnx.Rngs(1)))
      path             weight           sketch      kept
      blocks/mlp/down  4 × (344 × 128)  stratified  12.5% of rows
      blocks/mlp/gate  4 × (128 × 344)  stratified  12.5% of rows
      blocks/mlp/up    4 × (128 × 344)  stratified  12.5% of rows
      >>> type(lro.layers.restore_linears(model).blocks.mlp.up).__name__
      'Linear'

    Reference:
      Bershatsky et al., 2022, https://arxiv.org/abs/2201.13195, replace every linear layer.
    """
    layers = linear_layers(model)
    sketches = _sketches(layers, sketch, where)
    stacks = {path: _stack(path_string(path), layers[path]) for path in sketches}
    rngs = rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs)
    for path, own in sketches.items():
        layer = layers[path]
        layer.sketch = own
        if not isinstance(layer, RandomizedLinear):
            layer.deterministic = False
            layer.sketch_stream = sketch_stream(rngs, stacks[path])
            set_class(layer, _randomized(type(layer)))
    return randomized_layers(model)


def restore_linears(model: Any) -> nnx.Module:
    """Makes all randomized layers of a model plain ones again, in place: undoes `randomize`.

    Weights and structure are then as they were before; the layers' random streams are gone.

    Args:
      model: Any NNX model.

    Returns:
      The model itself.

    Raises:
      ValueError: If there is no randomized layer, or one has adapters, or another wrapper that was
        put around it later: take that off first.
    """
    layers = randomized_modules(model)
    if not layers:
        raise ValueError(f"the {type(model).__name__} has no randomized layer to restore.")
    for path, layer in layers.items():
        if "class_without_sketch" not in vars(type(layer)):
            around = "adapters" if hasattr(layer, "adapters") else f"{type(layer).__name__}'s calls"
            raise ValueError(f"{path_string(path)} is wrapped by {around}: take that off first.")
    for layer in layers.values():
        del layer.sketch, layer.deterministic, layer.sketch_stream
        set_class(layer, vars(type(layer))["class_without_sketch"])
    return model


def randomized_layers(model: nnx.Module) -> RandomizedSummary:
    """Which layers of a model are randomized, and how: print it, or read its ``rows``."""
    rows = [
        RandomizedLayer(path_string(path), matrices_string(stack, *matrix), layer.sketch)
        for path, layer in randomized_modules(model).items()
        for matrix, stack in [_weight(layer)]
    ]
    return RandomizedSummary(rows)


def randomized_modules(model: nnx.Module) -> dict[Path, Any]:
    """The randomized layers of a model, by path; shared ones once."""
    return _of_type(model, RandomizedLinear)


def linear_layers(model: nnx.Module) -> dict[Path, Any]:
    """The layers of a model that can be randomized, by path; shared ones once."""
    return _of_type(model, nnx.Linear)


def _of_type(model: nnx.Module, of: type) -> dict[Path, Any]:
    modules = nnx.iter_modules(model)
    return {tuple(map(str, path)): x for path, x in modules if isinstance(x, of)}


def _sketches(layers: Mapping[Path, Any], sketch: Any, where: Where) -> dict[Path, Sketch]:
    """The sketches of the layers that are meant, in their order."""
    for each in sketch.values() if isinstance(sketch, Mapping) else [sketch]:
        check_sketch(each)
    if where is not None:
        layers = {path: layers[path] for path in matching("where", layers, where, _LAYER)}
    if isinstance(sketch, Mapping):
        found: dict[Path, Sketch] = {}
        for pattern, own in sketch.items():
            for path in matching("sketch", layers, pattern, _LAYER):
                found.setdefault(path, own)
        return {path: found[path] for path in layers if path in found}
    if where is None:
        is_meant = lambda path: is_weight(f"{path_string(path)}/kernel")
        known, layers = layers, {path: x for path, x in layers.items() if is_meant(path)}
        if not layers:
            raise ValueError(f"where=None finds no linear layer except heads; {near(known, '')}")
    return dict.fromkeys(layers, sketch)


def _stack(name: str, layer: Any) -> tuple[int, ...]:
    """The sizes of the axes along which a layer is stacked.

    Raises:
      ValueError: If it cannot be randomized.
    """
    cls = type(layer)
    if not isinstance(layer, RandomizedLinear) and cls.__call__ is not nnx.Linear.__call__:
        of = "adapters" if hasattr(layer, "adapters") else f"a call of its own, of {cls.__name__}"
        raise ValueError(
            f"{name} has {of}, which randomize would not know: randomize plain layers (adapters "
            "can be attached afterwards), or leave it out by where."
        )
    check_dot_general(layer.dot_general, name)
    _, stack = _weight(layer)
    if len(layer.kernel.shape) != 2 + len(stack):
        raise ValueError(
            f"the kernel of {name} has shape {layer.kernel.shape}, of which one layer has "
            f"{(layer.in_features, layer.out_features)}: stack layers along the first axis."
        )
    return stack


def _weight(layer: Any) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Inputs and outputs of a layer, and the sizes of the axes in front."""
    kernels = read_layer(layer)
    bias = None if layer.bias is None else layer.bias.shape
    placed = place(kernels[0], layer.kernel.shape, bias) if kernels else None
    return (layer.in_features, layer.out_features), () if placed is None else placed[1]


@functools.cache
def _randomized(cls: type) -> type:
    """The class of a randomized layer: of a plain one `RandomizedLinear`, else its own subclass."""
    if cls is nnx.Linear:
        return RandomizedLinear
    body = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    bases = (RandomizedLinear, cls)
    body |= {"class_without_sketch": cls, **made_by(_randomized, cls)}
    return type(cls)(cls.__name__, bases, body)
