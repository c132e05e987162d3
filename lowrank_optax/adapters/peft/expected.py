"""The tensors that a configuration asks of a base, compared with those of a file.

What is accepted and refused is decided here, for adapters that are attached to a Flax model
(`load_peft`) and for those that are folded into files (``convert``).
"""

from collections.abc import Callable, Iterable, Mapping
import difflib
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar
import warnings

import numpy as np

from lowrank_optax.adapters.peft.config import MERGE_IN_PEFT, PeftConfig, UnsupportedConfigError
from lowrank_optax.adapters.peft.folders import PREFIX, open_tensors, plain_name, split_name
from lowrank_optax.adapters.peft.layouts import Layout
from lowrank_optax.adapters.peft.matching import (
    has_pattern,
    in_layers,
    is_named,
    is_saved,
    is_target,
    rank_of,
)
from lowrank_optax.adapters.peft.tied import Tied

Shapes = Mapping[str, tuple[int, ...]]

_LISTED = 8
# PEFT adds all names that the heads of a task have, of which a model has one.
_HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class Module(Protocol):
    """A module of the base: a `Slot` of a Flax model, or one of files."""

    @property
    def is_layer(self) -> bool:
        """Whether adapters can be attached to it."""

    def layout(self) -> Layout | None:
        """How its weight lies; None if it is no layer."""

    def shapes(self) -> Shapes:
        """PyTorch's shapes of its own parameters."""


M = TypeVar("M", bound=Module)


class Expected(NamedTuple, Generic[M]):
    """What a file must hold, and may.

    Attributes:
      modules: All modules of the base.
      layers: Those that are adapted.
      shapes: Shapes of the tensors that must be there, by module and what follows its name.
      optional: Shapes of the tensors that may be there, likewise.
      tied: The base's tied embedding and head.
    """

    modules: Mapping[str, M]
    layers: Mapping[str, M]
    shapes: Mapping[tuple[str, str], tuple[int, ...]]
    optional: Mapping[tuple[str, str], tuple[int, ...]]
    tied: Tied | None


def file_shapes(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of an adapter's tensors, by module and what follows its name."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    with open_tensors(folder) as reader:
        for name, shape in reader.shapes.items():
            module, tensor = split_name(plain_name(name))
            found.setdefault(module, {})[tensor] = shape
    return found


def expected_tensors(
    modules: Mapping[str, M],
    config: PeftConfig,
    found: Iterable[str],
    tied: Tied | None = None,
) -> Expected[M]:
    """What a file of this configuration holds for this base.

    Args:
      modules: Modules of the base, by PyTorch's names.
      config: The adapter's configuration.
      found: Names of the modules that the file has tensors for.
      tied: The base's tied embedding and head.

    Raises:
      ValueError: If the adapter is of another architecture, or something that the configuration
        names is not in the base; near names are listed.
      UnsupportedConfigError: If it selects something that is not supported.
    """
    _check_tied(modules, config, tied)
    layers = {m: s for m, s in modules.items() if s.is_layer and is_target(m, config)}
    layouts = {module: layer.layout() for module, layer in layers.items()}
    _check_architecture(modules, list(found))
    _check_names(modules, layers, config)
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    optional: dict[tuple[str, str], tuple[int, ...]] = {}
    for module, layout in layouts.items():
        assert layout is not None  # it is a layer
        if config.use_dora and layout.kind == "embedding":
            raise UnsupportedConfigError(
                f"use_dora=True of an embedding ({module}): unsupported. {MERGE_IN_PEFT}"
            )
        if config.init_lora_weights == "pissa" and layout.kind != "linear":
            raise UnsupportedConfigError(
                f"init_lora_weights='pissa' of {module}, which is no linear layer: unsupported. "
                f"{MERGE_IN_PEFT}"
            )
        of_layer = layout.shapes(rank_of(module, config), config.use_dora)
        shapes |= {(module, name): shape for name, shape in of_layer.items()}
        optional[module, "base_layer.weight"] = layout.weight_shape
    for name, module in modules.items():
        if is_saved(name, config.modules_to_save) and name not in layers:
            shapes |= {(name, p): shape for p, shape in module.shapes().items()}
        elif config.bias != "none" and "bias" in module.shapes():
            key = "base_layer.bias" if name in layers else "bias"
            optional[name, key] = module.shapes()["bias"]
    if tied and (tied.embedding, "weight") in shapes:
        optional[tied.head, "weight"] = shapes[tied.embedding, "weight"]
    return Expected(modules, layers, shapes, optional, tied)


def read_tensors(folder: Path, expected: Expected[M]) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of a file by module and what follows its name, after all have been compared.

    Raises:
      CheckpointMismatchError: If the file is damaged, or its tensors are others.
      ValueError: If it has two values of a weight that is an embedding's and a head's.
    """
    with open_tensors(folder) as reader:
        plain = {plain_name(name): name for name in reader.shapes}
        raw = {key: plain.get(".".join(key), PREFIX + ".".join(key)) for key in expected.shapes}
        may = {key: plain[".".join(key)] for key in expected.optional if ".".join(key) in plain}
        wanted = {raw[key]: shape for key, shape in expected.shapes.items()}
        wanted |= {may[key]: expected.optional[key] for key in may}
        reader.check(wanted, ignore=lambda _: False)
        if tied := expected.tied:
            both = [may.get((tied.head, "weight")), raw.get((tied.embedding, "weight"))]
            if all(both) and not reader.equal(*map(str, both)):
                raise ValueError(f"{' and '.join(map(str, both))} are tied, but differ.")
        tensors: dict[str, dict[str, np.ndarray]] = {}
        for (module, tensor), name in (raw | may).items():
            tensors.setdefault(module, {})[tensor] = reader.read(name)
    return tensors


def _check_architecture(modules: Mapping[str, Module], found: list[str]) -> None:
    if not found or any(name in modules for name in found):
        return
    prefixes = {name[: -len(m)] for name in found for m in modules if name.endswith(f".{m}")}
    if len(prefixes) == 1:
        raise ValueError(
            f"the adapter changes {_some(found)}, and the model's names lack the prefix "
            f"{prefixes.pop()!r}, as those of a bare model without a head do. Load it by "
            "transformers' AutoModelForCausalLM and save it again; for a model of your own, give "
            "`names` with the prefix."
        )
    raise ValueError(
        f"the adapter changes {_some(found)}, and the model has no module of these names. It has "
        f"{_some([m for m, s in modules.items() if s.is_layer])}: the adapter is of another "
        "architecture, or was saved under other names."
    )


def _check_tied(modules: Mapping[str, Module], config: PeftConfig, tied: Tied | None) -> None:
    """An adapter changes both of two modules with one weight, or none."""
    if tied is None:
        return
    embedding, head = tied
    saved = [m for m in tied if is_saved(m, config.modules_to_save)]
    targets = [m for m in tied if is_target(m, config)]
    if config.ensure_weight_tying:
        if targets:
            raise UnsupportedConfigError(
                f"ensure_weight_tying=True of the adapted {embedding}, one adapter of a tied "
                f"embedding and head: unsupported. {MERGE_IN_PEFT}"
            )
        return
    if saved or (head in targets and head not in modules):
        field = "modules_to_save" if saved else "target_modules"
        raise UnsupportedConfigError(
            f"{field} has {(saved or targets)[0]} alone: PEFT gave it a weight of its own, and in "
            f"this model {embedding} and {head} have one. Load a base that does not tie them "
            "(tie_word_embeddings false, and a head in its files), or train with "
            "ensure_weight_tying."
        )


def _check_names(
    modules: Mapping[str, Module], layers: Mapping[str, Module], config: PeftConfig
) -> None:
    """Whatever the configuration names is there."""
    all_layers = [m for m, s in modules.items() if s.is_layer]
    targets = config.target_modules
    if isinstance(targets, tuple):
        is_there = lambda target: any(is_named(m, (target,)) for m in all_layers)
        _check_each("target_modules", targets, is_there, all_layers)
    if not layers:
        others = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        given = {field: getattr(config, field) for field in others if getattr(config, field)}
        beside = f" with {', '.join(f'{k}={v!r}' for k, v in given.items())}" if given else ""
        raise ValueError(
            f"target_modules={targets!r}{beside} of adapter_config.json selects no layer of the "
            f"model, which has {_some(all_layers)}."
        )
    _check_layers(all_layers, config)
    saved = config.modules_to_save or ()
    is_there = lambda name: any(is_saved(m, (name,)) for m in modules)
    of_task = _HEADS_OF_TASKS.get(str(config.others.get("task_type")), ())
    if any(map(is_there, of_task)):
        saved = tuple(name for name in saved if name not in of_task)
    _check_each("modules_to_save", saved, is_there, modules)
    for field in ("rank_pattern", "alpha_pattern"):
        is_there = lambda pattern: any(has_pattern(m, pattern) for m in layers)
        _check_each(field, getattr(config, field), is_there, layers)
    excluded = config.exclude_modules or ()
    for name in (excluded,) if isinstance(excluded, str) else excluded:
        exclusion = name if isinstance(excluded, str) else (name,)
        if not any(is_named(part, exclusion) for m in modules for part in _containers(m)):
            warnings.warn(
                f"exclude_modules={name!r} of adapter_config.json excludes nothing of the model.",
                stacklevel=5,
            )


def _check_layers(layers: list[str], config: PeftConfig) -> None:
    wanted = config.layers_to_transform
    named = [m for m in layers if is_named(m, config.target_modules)]
    named = [m for m in named if m not in (config.target_modules or ())]  # whole names: in any
    if wanted is None or not named:
        return
    for layer in (wanted,) if isinstance(wanted, int) else wanted:
        pattern = config.layers_pattern
        if not any(in_layers(m, layer, pattern) for m in named):
            beside = f" with layers_pattern={pattern!r}" if pattern else ""
            raise ValueError(
                f"layers_to_transform={layer}{beside} of adapter_config.json selects none of "
                f"{_some(named)}."
            )


def _check_each(
    field: str, names: Iterable[str], is_there: Callable[[str], bool], known: Iterable[str]
) -> None:
    absent = [name for name in names if not is_there(name)]
    if not absent:
        return
    last = sorted({m.rpartition(".")[2] for m in known})
    near = [n for name in absent for n in difflib.get_close_matches(name, last, n=2)]
    raise ValueError(
        f"{field} of adapter_config.json has {', '.join(map(repr, absent))}, and the model has "
        f"nothing of that name; it has {', '.join(dict.fromkeys(near)) or _some(last)}."
    )


def _containers(module: str) -> list[str]:
    """A module and those that it is in."""
    parts = module.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
