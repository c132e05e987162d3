"""The tensors that a configuration asks of a model, compared with those of a file."""

from collections.abc import Mapping
import difflib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lowrank_optax.adapters.peft.config import PeftConfig, UnsupportedConfigError
from lowrank_optax.adapters.peft.folders import PREFIX, open_tensors, plain_name
from lowrank_optax.adapters.peft.matching import is_saved, is_target, rank_of
from lowrank_optax.adapters.peft.module_names import Slot


class Expected(NamedTuple):
    """What a file must hold, and may.

    Attributes:
      slots: All modules of the model that PyTorch has.
      layers: Those that are adapted.
      shapes: Of the tensors that must be there: by module and what follows its name.
      optional: Likewise those that may.
    """

    slots: Mapping[str, Slot]
    layers: Mapping[str, Slot]
    shapes: Mapping[tuple[str, str], tuple[int, ...]]
    optional: Mapping[tuple[str, str], tuple[int, ...]]


def expected_tensors(slots: Mapping[str, Slot], config: PeftConfig) -> Expected:
    """What a file of this configuration holds for this model.

    Raises:
      ValueError: If the configuration selects none of its layers.
      UnsupportedConfigError: If it selects one that is not supported.
    """
    layers = {m: s for m, s in slots.items() if s.is_layer and is_target(m, config)}
    if not layers:
        raise ValueError(
            f"target_modules={config.target_modules!r} of adapter_config.json selects no layer of "
            f"the model; {_near(slots, config)}"
        )
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    optional: dict[tuple[str, str], tuple[int, ...]] = {}
    for module, slot in layers.items():
        layout = slot.layout()
        assert layout is not None  # it is a layer
        if config.use_dora and layout.kind == "embedding":
            raise UnsupportedConfigError(f"use_dora=True of an embedding ({module}): unsupported.")
        if config.init_lora_weights == "pissa" and layout.kind != "linear":
            raise UnsupportedConfigError(
                f"init_lora_weights='pissa' of {module}, which is no linear layer: unsupported."
            )
        of_layer = layout.shapes(rank_of(module, config), config.use_dora)
        shapes |= {(module, name): shape for name, shape in of_layer.items()}
        optional[module, "base_layer.weight"] = layout.weight_shape
    for module, slot in slots.items():
        if is_saved(module, config) and module not in layers:
            shapes |= {(module, p): slot.read(p).shape for p in slot.parameters()}
        elif config.bias != "none" and "bias" in slot.parameters():
            key = "base_layer.bias" if module in layers else "bias"
            optional[module, key] = slot.read("bias").shape
    return Expected(slots, layers, shapes, optional)


def read_tensors(folder: Path, expected: Expected) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of a file by module and what follows its name, after all have been compared.

    Raises:
      CheckpointMismatchError: If the file is damaged, or its tensors are others.
    """
    with open_tensors(folder) as reader:
        plain = {plain_name(name): name for name in reader.shapes}
        raw = {key: plain.get(".".join(key), PREFIX + ".".join(key)) for key in expected.shapes}
        may = {key: plain[".".join(key)] for key in expected.optional if ".".join(key) in plain}
        wanted = {raw[key]: shape for key, shape in expected.shapes.items()}
        wanted |= {may[key]: expected.optional[key] for key in may}
        reader.check(wanted, ignore=lambda _: False)
        tensors: dict[str, dict[str, np.ndarray]] = {}
        for (module, tensor), name in (raw | may).items():
            tensors.setdefault(module, {})[tensor] = reader.read(name)
    return tensors


def _near(slots: Mapping[str, Slot], config: PeftConfig) -> str:
    known = sorted({m.rpartition(".")[2] for m, slot in slots.items() if slot.is_layer})
    targets = config.target_modules
    asked = (targets,) if isinstance(targets, str) else targets or ()
    near = [n for name in asked for n in difflib.get_close_matches(name, known, n=2)]
    return f"it has {', '.join(near or known)}."
