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
    records = {path: _to_json(layer) for path, layer in layers.items()}
    content = {"version": VERSION, "sha256": _digest(records, data), LAYERS: records}
    text = json.dumps(content, indent=1)
    with replaced_folder(Path(folder), _KIND) as staging:
        (staging / ARRAYS).write_bytes(data)
        (staging / JSON).write_text(text + "\n", encoding="utf-8")


def _digest(records: Any, data: bytes) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode() + data).hexdigest()


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
        if _digest(records, data) != content["sha256"]:
            raise ValueError(f"{JSON} and {ARRAYS} are not as they were written together")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            tensors = {name: arrays[name] for name in arrays.files}
        layers = {path: _from_json(path, each, tensors) for path, each in records.items()}
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder} holds no complete fixed-point model: {why}.") from None
    return IntegerLayers(layers)


def _from_json(path: str, record: dict[str, Any], tensors: dict[str, np.ndarray]) -> IntegerLayer:
    parts: dict[str, Any] = {
        name: IntegerArray(tensors[f"{path}/{name}"], np.asarray(record[name]["fraction_bits"]))
        for name in ("weight", "bias")
        if name in record
    }
    for name in ("input", "output"):
        if name in record:
            format = dict(record[name])
            position = np.asarray(format.pop("integer_bits"))
            parts[name] = Cast(FixedPointFormat(**format), position)
    return IntegerLayer(record["kind"], **parts, options=record.get("options", {}))
