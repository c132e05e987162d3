"""The tensors of an adapter: their file, their names, and how those of one layer are laid out.

PyTorch stores a linear layer as [out, in]: every factor is transposed here, once. Fused heads are
their matrix: ``[d, heads, head_dim]`` has PyTorch's ``heads * head_dim`` outputs, in that order.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
import re
from typing import Any, Literal, NamedTuple

import numpy as np

from lowrank_optax.adapters.peft.config import CONFIG_FILE, read_json
from lowrank_optax.storage.folders import FolderKind, replaced_folder
from lowrank_optax.storage.safetensors_files import TensorReader, import_safetensors

TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
SHARED = ""  # Module of the tensors that all layers share: they are named base_model.vera_A.

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, np.ndarray]

# Names of the tensors of adapters, beside those of LoRA.
_TENSORS = (
    "hada_(?:w[12]_[ab]|t[12])",
    "ia3_l",
    "lokr_(?:w[12](?:_[ab])?|t2)",
    "(?:miss|bone)_block",
    r"oft_(?:embedding_)?R(?:\.weight)?",
    "randlora_(?:lambda|gamma|[AB])",
    "vera_(?:lambda_[bd]|[AB])",
)
_OF_ADAPTER = re.compile(rf"(.*)\.({'|'.join(_TENSORS)})")
_DEFAULT = re.compile(
    r"(\.(?:(?:lora|vera|randlora|miss|bone|hada|lokr|oft)_\w+|ia3_l))\.default(?=\.|$)"
)
_PICKLED = "adapter_model.bin"
_FOLDER = FolderKind("an adapter", CONFIG_FILE, "peft_type", (CONFIG_FILE, TENSOR_FILE, _PICKLED))
_MISSING = "Hugging Face adapters need safetensors: pip install 'lowrank_optax[peft]'"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the tensors of a layer are laid out.

    Attributes:
      kind: Kind of the layer.
      d_in: Inputs of its matrix; of a convolution, ``window * channels``; of an embedding, rows.
      d_out: Outputs.
      window: Spatial sizes of a convolution's kernel.
      inputs_first: Whether PyTorch's weight is [in, out], as in transformers' Conv1D; the factors
        are those of any linear layer.
      experts: ``(E,)`` of a stack of experts, whose weight and factors here have this axis in
        front; PyTorch's ``lora_A`` has the expert's index before the rank's, ``lora_B`` after it.
    """

    kind: Literal["linear", "embedding", "convolution", "experts"]
    d_in: int
    d_out: int
    window: tuple[int, ...] = ()
    inputs_first: bool = False
    experts: tuple[int, ...] = ()

    def shapes(self, rank: int, dora: bool = False) -> dict[str, tuple[int, ...]]:
        """Names (after the module's) and shapes of the tensors of an adapter."""
        if self.kind == "embedding":
            return {"lora_embedding_A": (rank, self.d_in), "lora_embedding_B": (self.d_out, rank)}
        ones, rows = (1,) * len(self.window), rank * math.prod(self.experts)
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A.weight": (rows, *self._inputs),
            "lora_B.weight": (self.d_out, rows, *ones),
        }
        if dora:
            of_convolution = (1, self.d_out, *ones) if self.window else (self.d_out,)
            shapes["lora_magnitude_vector"] = of_convolution
        return shapes

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """PyTorch's shape of the weight."""
        if self._as_matrix:
            return self.d_in, self.d_out
        return (*self.experts, self.d_out, *self._inputs)

    def pack(self, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None = None) -> Tensors:
        """The tensors of an adapter with factors ``a [d_in, r]`` and ``b [r, d_out]``."""
        shapes = self.shapes(a.shape[-1], magnitude is not None)
        tensors = [self._outputs_first(a), b.T]
        tensors += [] if magnitude is None else [magnitude]
        return {
            name: tensor.reshape(shape)
            for (name, shape), tensor in zip(shapes.items(), tensors, strict=True)
        }

    def unpack(self, tensors: Tensors) -> tuple[np.ndarray, np.ndarray]:
        """The factors, the inverse of `pack`, in float32."""
        a, b = (tensors[name].astype(np.float32) for name in list(self.shapes(1))[:2])
        return self._outputs_last(a), b.reshape(self.d_out, -1, *self.experts).T

    def pack_weight(self, matrix: np.ndarray) -> np.ndarray:
        """PyTorch's tensor of a weight ``[d_in, d_out]``, in its dtype."""
        tensor = matrix if self._as_matrix else self._outputs_first(matrix)
        return np.ascontiguousarray(tensor.reshape(self.weight_shape))

    def unpack_weight(self, tensor: np.ndarray) -> np.ndarray:
        """The weight as a matrix, the inverse of `pack_weight`."""
        return tensor if self._as_matrix else self._outputs_last(tensor)

    @property
    def _as_matrix(self) -> bool:
        """Whether PyTorch's weight is the matrix itself."""
        return self.kind == "embedding" or self.inputs_first

    @property
    def _inputs(self) -> tuple[int, ...]:
        """PyTorch's axes of inputs: channels first."""
        return self.d_in // math.prod(self.window), *self.window

    def _outputs_first(self, matrix: np.ndarray) -> np.ndarray:
        """``[window * channels, k]`` to ``[k, channels, *window]``, of experts each."""
        if self.experts:
            return matrix.swapaxes(-1, -2)
        kernel = matrix.reshape(*self.window, self._inputs[0], matrix.shape[1])
        return np.moveaxis(kernel, (-1, -2), (0, 1))

    def _outputs_last(self, tensor: np.ndarray) -> np.ndarray:
        if self.experts:
            return tensor.reshape(*self.experts, -1, self.d_in).swapaxes(-1, -2)
        return np.moveaxis(tensor, (0, 1), (-1, -2)).reshape(self.d_in, tensor.shape[0])


class Tied(NamedTuple):
    """Names of an embedding and an output head with one weight; there may be no such head."""

    embedding: str
    head: str


class AdapterFolder(NamedTuple):
    """The content of an adapter's folder, of any kind of adapter.

    Attributes:
      content: Fields of its adapter_config.json.
      tensors: Tensors of its adapter_model.safetensors, by the names there.
    """

    content: Mapping[str, Any]
    tensors: Tensors


def read_adapter(path: str | os.PathLike) -> AdapterFolder:
    """Reads a folder."""
    content = read_json(Path(path))
    with open_tensors(Path(path)) as reader:
        return AdapterFolder(content, {name: reader.read(name) for name in reader.shapes})


def write_adapter(path: str | os.PathLike, adapter: AdapterFolder) -> None:
    """Writes a folder that replaces an earlier one when it is complete; other files in it stay.

    Raises:
      FileExistsError: If ``path`` is a file, or a folder with other things than an adapter.
    """
    import_safetensors(_MISSING)
    from safetensors.numpy import save_file

    text = json.dumps(adapter.content, indent=2, sort_keys=True) + "\n"
    tensors = {name: np.ascontiguousarray(x) for name, x in adapter.tensors.items()}
    with replaced_folder(Path(path), _FOLDER) as target:
        (target / CONFIG_FILE).write_text(text, encoding="utf-8")
        # The metadata is what transformers asks for.
        save_file(tensors, target / TENSOR_FILE, metadata={"format": "pt"})


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[TensorReader]:
    """The tensors of an adapter's folder, by the names they have in the file."""
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


def split_name(name: str) -> tuple[str, str]:
    """A tensor's name as its module's and what follows, without prefix and adapter's name.

    Example:
      >>> split_name("base_model.model.lm_head.lora_A.default.weight")
      ('lm_head', 'lora_A.weight')
      >>> split_name("base_model.model.model.norm.weight")
      ('model.norm', 'weight')
      >>> split_name("base_model.model.lm_head.oft_R.weight"), split_name("base_model.vera_A")
      (('lm_head', 'oft_R.weight'), ('', 'vera_A'))
    """
    name = _DEFAULT.sub(r"\1", name.removeprefix(PREFIX))
    name = re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name)
    if match := _OF_ADAPTER.fullmatch(name):
        return (SHARED if match[1] == "base_model" else match[1]), match[2]
    for inside in (".base_layer.", ".lora_"):
        if inside in name:
            at = name.find(inside)
            return name[:at], name[at + 1 :]
    module, _, tensor = name.rpartition(".")
    return module, tensor


def shapes_by_module(reader: TensorReader) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of an adapter's tensors, by module and what follows its name."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in reader.shapes.items():
        module, tensor = split_name(name)
        found.setdefault(module, {})[tensor] = shape
    return found
