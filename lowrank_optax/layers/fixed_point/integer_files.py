"""Folders with the integers of fixed-point layers: formats in JSON, arrays in a NumPy file."""

from collections.abc import Mapping
import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any
import zipfile

import numpy as np

from lowrank_optax.layers.fixed_point.formats import FixedPointFormat
from lowrank_optax.layers.fixed_point.integers import (
    Cast,
    IntegerArray,
    IntegerLayer,
    IntegerLayers,
)
from lowrank_optax.storage.folders import FolderKind, replaced_folder

JSON, ARRAYS, LAYERS, VERSION = "fixed_point.json", "fixed_point.npz", "fixed_point_layers", 1
_KIND = FolderKind("a fixed-point model", JSON, LAYERS, (JSON, ARRAYS))
_TENSORS = {"linear": True, "convolution": True, "norm": True, "sum": False, "quantizer": False}
_OPTIONS = ("strides", "padding", "kernel_dilation", "groups")


def write_layers(layers: Mapping[str, IntegerLayer], folder: str | Path) -> None:
    """Write layers into a folder, which is replaced as a whole."""
    arrays: dict[str, Any] = {
        f"{path}/{name}": _narrow(tensor.integers)
        for path, layer in layers.items()
        for name, tensor in (("weight", layer.weight), ("bias", layer.bias))
        if tensor is not None
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    data = buffer.getvalue()
    content = {
        "version": VERSION,
        "sha256": hashlib.sha256(data).hexdigest(),
        LAYERS: {path: _to_json(layer) for path, layer in layers.items()},
    }
    text = json.dumps(content, indent=1)
    with replaced_folder(Path(folder), _KIND) as staging:
        (staging / ARRAYS).write_bytes(data)
        (staging / JSON).write_text(text + "\n", encoding="utf-8")


def _narrow(integers: np.ndarray) -> np.ndarray:
    """The integers in the smallest signed dtype that holds them."""
    low, high = int(integers.min(initial=0)), int(integers.max(initial=0))
    fits = lambda dtype: np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max
    dtype = next(dtype for dtype in (np.int8, np.int16, np.int32, np.int64) if fits(dtype))
    return integers.astype(dtype)


def _to_json(layer: IntegerLayer) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": layer.kind}
    for name in ("weight", "bias"):
        tensor = getattr(layer, name)
        if tensor is not None:
            found[name] = {"fraction_bits": tensor.fraction_bits.tolist()}
    for name in ("input", "output"):
        cast = getattr(layer, name)
        if cast is not None:
            point = np.asarray(cast.integer_bits).tolist()
            found[name] = {**dataclasses.asdict(cast.format), "integer_bits": point}
    return found | {"options": dict(layer.options)} if layer.options else found


def load_integers(folder: str | Path) -> IntegerLayers:
    """Read the integers of fixed-point layers, as layers that compute in NumPy integers alone.

    Needs neither Flax nor the model. Nothing is read in part: the files are checked against each
    other first.

    Args:
      folder: Folder that `save_integers` wrote.

    Returns:
      The layers by their path; call them with `IntegerArray` inputs.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If a file is damaged or of another version, or the two do not go together (the
        message says what is wrong).
    """
    folder = Path(folder)
    text, data = (folder / JSON).read_bytes(), (folder / ARRAYS).read_bytes()
    try:
        content = json.loads(text)
        version, records = content["version"], dict(content[LAYERS])
        if version != VERSION:
            raise ValueError(f"version {version!r} is not {VERSION}")
        if hashlib.sha256(data).hexdigest() != content["sha256"]:
            raise ValueError(f"{ARRAYS} is not the file that {JSON} was written with")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            tensors = {name: arrays[name] for name in arrays.files}
        layers = {path: _from_json(path, dict(each), tensors) for path, each in records.items()}
        if tensors:
            raise ValueError(f"no layer has the arrays {', '.join(sorted(tensors))}")
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder} holds no complete fixed-point model: {why}.") from None
    return IntegerLayers(layers)


def _from_json(path: str, record: dict[str, Any], tensors: dict[str, np.ndarray]) -> IntegerLayer:
    try:
        kind = record.pop("kind")
        if kind not in _TENSORS:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(_TENSORS)}")
        parts: dict[str, Any] = {}
        for name in ("weight", "bias"):
            if name in record:
                parts[name] = _tensor(tensors.pop(f"{path}/{name}"), **record.pop(name))
        if _TENSORS[kind] != ("weight" in parts) or ("bias" in parts and not _TENSORS[kind]):
            raise ValueError(f"a {kind} has other arrays than {', '.join(parts) or 'none'}")
        for name in ("input", "output"):
            if name in record:
                parts[name] = _cast(**record.pop(name))
        options = record.pop("options", {})
        if record:
            raise ValueError(f"unknown fields {', '.join(record)}")
        layer = IntegerLayer(kind, **parts, options=_options(kind, options))
        _check_shapes(layer)
    except (ValueError, TypeError, KeyError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"layer {path}: {why}") from None
    return layer


def _tensor(integers: np.ndarray, fraction_bits: Any) -> IntegerArray:
    return IntegerArray(integers, np.asarray(fraction_bits))


def _cast(integer_bits: Any, **format: Any) -> Cast:
    position = np.asarray(integer_bits)
    if position.dtype.kind != "i" or position.ndim > 1:
        raise TypeError(f"integer_bits={integer_bits!r} must be an int or a list of them")
    return Cast(FixedPointFormat(**format), position)


def _options(kind: str, options: Any) -> dict[str, Any]:
    if sorted(options) != sorted(_OPTIONS if kind == "convolution" else ()):
        raise ValueError(f"a {kind} does not have the options {options!r}")
    if kind != "convolution":
        return {}
    positive = lambda x: isinstance(x, int) and not isinstance(x, bool) and x > 0
    padding = options["padding"]
    if padding not in ("SAME", "VALID"):
        padding = tuple((_not_negative(a), _not_negative(b)) for a, b in padding)
    for name in ("strides", "kernel_dilation"):
        if not all(map(positive, options[name])):
            raise ValueError(f"{name}={options[name]!r} must be positive integers")
    if not positive(options["groups"]):
        raise ValueError(f"groups={options['groups']!r} must be a positive integer")
    found = {name: tuple(options[name]) for name in ("strides", "kernel_dilation")}
    return found | {"padding": padding, "groups": options["groups"]}


def _not_negative(x: Any) -> int:
    if not isinstance(x, int) or isinstance(x, bool) or x < 0:
        raise ValueError(f"padding {x!r} must be an integer of at least 0")
    return x


def _check_shapes(layer: IntegerLayer) -> None:
    if layer.weight is None:
        return
    shape, outputs = layer.weight.shape, layer.weight.shape[-1:]
    rank = {"linear": 2, "norm": 1}.get(layer.kind, 2 + len(layer.options.get("strides", ())))
    if len(shape) != rank:
        raise ValueError(f"the weight of a {layer.kind} has shape {shape}, not of {rank} axes")
    spatial = [layer.options[n] for n in ("kernel_dilation", "padding") if n in layer.options]
    if any(not isinstance(x, str) and len(x) != rank - 2 for x in spatial):
        raise ValueError(f"the options of a kernel {shape} need {rank - 2} numbers each")
    if outputs and layer.options and outputs[0] % layer.options["groups"]:
        raise ValueError(f"{layer.options['groups']} groups do not divide {outputs[0]} outputs")
    for tensor in filter(None, (layer.weight, layer.bias)):
        if tensor.fraction_bits.shape not in ((), outputs):
            raise ValueError(f"fraction_bits has shape {tensor.fraction_bits.shape}")
    if layer.bias is not None and layer.bias.shape != outputs:
        raise ValueError(f"the bias has shape {layer.bias.shape}, not {outputs}")
