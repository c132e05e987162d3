"""An adapter's folder: adapter_config.json and adapter_model.safetensors."""

from collections.abc import Iterator, Mapping
import contextlib
import os
from pathlib import Path
import re

import numpy as np

from lowrank_optax.adapters.peft.config import CONFIG_FILE
from lowrank_optax.storage.folders import FolderKind, replaced_folder
from lowrank_optax.storage.safetensors_files import TensorReader, import_safetensors

TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_PICKLED = "adapter_model.bin"
_FOLDER = FolderKind("an adapter", CONFIG_FILE, "peft_type", (CONFIG_FILE, TENSOR_FILE, _PICKLED))
_MISSING = "Hugging Face adapters need safetensors: pip install 'lowrank_optax[peft]'"


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[TensorReader]:
    """The tensors of an adapter's folder, by the names they have in the file.

    Raises:
      ImportError: safetensors is not installed.
      FileNotFoundError: There is no such file.
      ValueError: There is only a pickled one, or names do not begin as PEFT's do.
      CheckpointMismatchError: The file is damaged.
    """
    if not (folder / TENSOR_FILE).exists():
        if (folder / _PICKLED).exists():
            raise ValueError(
                f"{folder / _PICKLED} is a pickle, and reading one runs whatever program it "
                "contains: it is not read. Load and save it with PEFT where you trust it, which "
                f"writes {TENSOR_FILE}."
            )
        raise FileNotFoundError(f"{folder} holds no {TENSOR_FILE}.")
    what = "the adapter in {} does not fit its configuration and the model"
    with TensorReader(folder, [TENSOR_FILE], missing_package=_MISSING, what=what) as reader:
        foreign = sorted(n for n in reader.shapes if not n.startswith("base_model."))
        if foreign:
            raise ValueError(
                f"names of tensors in {folder / TENSOR_FILE} lack the prefix {PREFIX!r}, so that "
                f"PEFT would not apply them: {', '.join(foreign[:5])}"
                f"{f' and {len(foreign) - 5} more' if len(foreign) > 5 else ''}."
            )
        yield reader


def plain_name(name: str) -> str:
    """A tensor's name without prefix and adapter's name: the module's, and what of it.

    Example:
      >>> plain_name("base_model.model.lm_head.lora_A.default.weight")
      'lm_head.lora_A.weight'
    """
    name = re.sub(r"(\.lora_[A-Za-z_]+)\.default(?=\.|$)", r"\1", name.removeprefix(PREFIX))
    return re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name)


def split_name(name: str) -> tuple[str, str]:
    """A plain name as the module's, and what follows it.

    Example:
      >>> split_name("lm_head.lora_A.weight"), split_name("model.norm.weight")
      (('lm_head', 'lora_A.weight'), ('model.norm', 'weight'))
    """
    for inside in (".base_layer.", ".lora_"):
        if inside in name:
            at = name.find(inside)
            return name[:at], name[at + 1 :]
    module, _, tensor = name.rpartition(".")
    return module, tensor


def write_folder(path: str | os.PathLike, config: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a folder that takes the place of an earlier one when it is complete.

    Args:
      path: A new or empty folder, or one that holds an adapter. Other files in it are kept.
      config: The text of its adapter_config.json.
      tensors: By their names in the file.

    Raises:
      ImportError: safetensors is not installed.
      FileExistsError: ``path`` is a file, or a folder with other things than an adapter.
    """
    import_safetensors(_MISSING)
    from safetensors.numpy import save_file

    with replaced_folder(Path(path), _FOLDER) as target:
        (target / CONFIG_FILE).write_text(config, encoding="utf-8")
        # The metadata is what transformers asks for.
        save_file(dict(tensors), target / TENSOR_FILE, metadata={"format": "pt"})
