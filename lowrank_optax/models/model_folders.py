"""Folders of Hugging Face models: config.json, and safetensors in one file or several."""

from collections.abc import Iterable, Iterator, Mapping
import json
from pathlib import Path
from typing import Self

import numpy as np

from lowrank_optax.models.huggingface_config import read_json
from lowrank_optax.storage.folders import FolderKind
from lowrank_optax.storage.safetensors_files import (
    CheckpointMismatchError,
    TensorReader,
    import_safetensors,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODEL_FOLDER = FolderKind(
    "a model", "config.json", "model_type", ("config.json", "*.safetensors", INDEX_FILE)
)
_MISSING = "Hugging Face checkpoints need safetensors: pip install 'lowrank_optax[examples]'"


_QUANTIZED_DTYPES = ("F8", "F6", "F4")
_QUANTIZED_NAMES = (
    ".qweight", ".qzeros", ".absmax", ".SCB", ".weight_scale", ".weight_scale_inv", "_packed",
)  # fmt: skip


class CheckpointReader(TensorReader):
    """The tensors of a model's folder, read one at a time. A context manager.

    Attributes:
        config: content of its config.json.

    Raises:
        FileNotFoundError: the folder holds no config.json or no safetensors.
        ValueError: the weights are quantized; raised on entering.
    """

    def __init__(self, folder: Path) -> None:
        self.config = read_json(folder)
        super().__init__(folder, _checkpoint_files(folder), missing_package=_MISSING)

    def __enter__(self) -> Self:
        """Opens every file and reads the headers."""
        super().__enter__()
        try:
            self._check_not_quantized()
        except ValueError:
            self.__exit__()
            raise
        return self

    def _check_not_quantized(self) -> None:
        text = self.config.get("text_config")
        configs = [self.config, text] if isinstance(text, Mapping) else [self.config]
        fields = ("quantization_config", "compression_config")
        told = next((c[field] for c in configs for field in fields if c.get(field)), None)
        found = [
            f"{name} is {dtype}"
            for name, dtype in self.dtypes.items()
            if dtype.startswith(_QUANTIZED_DTYPES) or name.endswith(_QUANTIZED_NAMES)
        ]
        if told is None and not found:
            return
        method = told.get("quant_method") if isinstance(told, Mapping) else told
        how = f"quantization_config has quant_method={method!r}" if told else found[0]
        raise ValueError(
            f"the model in {self.folder} is quantized ({how}), which is not read. Load it in "
            "transformers, dequantize it (`model.dequantize()`), save it, and give that folder."
        )


def _checkpoint_files(folder: Path) -> list[str]:
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.exists():
        raise FileNotFoundError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{_instead(folder)}"
        )
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = {INDEX_FILE: f"no index: {error!r}"}
        raise CheckpointMismatchError(folder, files=damaged) from error
    outside = {str(f): "not a file name" for f in files if Path(str(f)).name != f}
    if outside:
        raise CheckpointMismatchError(folder, files=outside)
    return sorted(files)


def _instead(folder: Path) -> str:
    """The end of an error: what the folder holds, and what to do about it."""
    pickles = sorted(p.name for end in ("bin", "pt", "pth") for p in folder.glob(f"*.{end}"))
    if not pickles:
        return ""
    return (
        f", but {pickles[0]}: a pickle, which runs whatever program is in it and is not read. Load "
        "the model in transformers where you trust it, and save it (`save_pretrained`), which "
        f"writes {SINGLE_FILE}"
    )


def write_sharded(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Writes tensors as `model.safetensors`, or in several files with an index.

    A file holds at most `max_shard_bytes`, or one tensor if that alone is larger.
    """
    import_safetensors(_MISSING)
    from safetensors.numpy import save_file

    weight_maps, total = [], 0
    for number, shard in enumerate(_shards(tensors, max_shard_bytes)):
        # The metadata is what transformers asks for.
        save_file(shard, folder / f"{number}.part", metadata={"format": "pt"})
        weight_maps.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    count = len(weight_maps)
    if count == 1:
        (folder / "0.part").rename(folder / SINGLE_FILE)
        return
    weight_map = {}
    for number, names in enumerate(weight_maps):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True)
    (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    shard, size = {}, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
