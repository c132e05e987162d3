"""The tensors that a configuration requires for a base, compared with those of a file.

What is accepted and refused is decided here, for adapters that are attached to a Flax model
(`load_peft`) and for those that are folded into files (``convert``).
"""

from collections.abc import Callable, Iterable, Mapping
import difflib
import itertools
import re
import warnings

import numpy as np

from lowrank_optax.adapters.peft.base_files import FileModule
from lowrank_optax.adapters.peft.config import (
    MERGE_IN_PEFT,
    BaseConfig,
    UnsupportedConfigError,
    as_tuple,
    is_named,
    is_saved,
)
from lowrank_optax.adapters.peft.module_names import Slot
from lowrank_optax.adapters.peft.parameter_names import check_saved, names_in_peft
from lowrank_optax.adapters.peft.tensors import PREFIX, SHARED, Layout, Tied, split_name
from lowrank_optax.storage.safetensors_files import TensorReader

_LISTED = 8
# PEFT adds all names that the heads of a task have, of which a model has one.
_HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

Module = FileModule | Slot
# By module and what follows its name.
_Shapes = dict[tuple[str, str], tuple[int, ...]]


def checked_tensors(
    reader: TensorReader, modules: Mapping[str, Module], config: BaseConfig, tied: Tied | None
) -> tuple[dict[str, Layout], dict[str, dict[str, np.ndarray]]]:
    """Reads the tensors of an adapter, after all have been compared with what a base requires.

    Returns:
      Layouts of the adapted layers by module, and tensors by module and what follows its name.
      Tensors that layers share are among those of each.

    Raises:
      CheckpointMismatchError: If the file is damaged, or its tensors are others.
      ValueError: If the adapter is of another architecture; something that the configuration names
        is not in the base (near names are listed); or the file has two values of a weight that is
        an embedding's and a head's, or of a tensor that layers share.
      UnsupportedConfigError: If the configuration selects something that is not supported.
    """
    layers = [m for m, x in modules.items() if x.is_layer and _is_target(m, x, config)]
    _check_tied(modules, config, tied)
    layouts = {m: layout for m in layers if (layout := modules[m].layout)}
    names = {".".join(split_name(name)): name for name in reader.shapes}
    changed = dict.fromkeys(split_name(n)[0] for n in reader.shapes)
    _check_architecture(modules, [m for m in changed if m != SHARED])
    _check_names(modules, layers, config)
    slots = {m: slot for m in layers if isinstance(slot := modules[m], Slot)}
    saved = [m for m, x in modules.items() if is_saved(m, config.modules_to_save)]
    check_saved([m for m in saved if not modules[m].is_parameter], slots)
    name_of = names_in_peft(slots)
    in_file = lambda key: f"{name_of(key[0])}.{key[1]}"
    required, optional = _expected_shapes(modules, layouts, config)
    if tied and (tied.embedding, "weight") in required:
        optional[tied.head, "weight"] = required[tied.embedding, "weight"]
    found = {k: names[in_file(k)] for k in required | optional if in_file(k) in names}
    prefix = lambda module: "base_model" if module == SHARED else PREFIX
    missing = {key: prefix(key[0]) + in_file(key) for key in required if key not in found}
    expected = {name: (required | optional)[key] for key, name in (found | missing).items()}
    reader.check(expected, ignore=lambda _: False)
    _warn_of_square_experts(layouts, config)
    both = [found[m, "weight"] for m in tied or () if (m, "weight") in found]
    if len(both) == 2 and not reader.equal(*both):
        raise ValueError(f"{' and '.join(reversed(both))} are tied, but differ.")
    shared = {tensor: found[SHARED, tensor] for tensor in config.shared_shapes(layouts.values())}
    for (_, tensor), name in found.items():
        if tensor in shared and not reader.equal(name, shared[tensor]):
            raise ValueError(f"{name} must be the same as {shared[tensor]}, but differs.")
    values = {tensor: reader.read(name) for tensor, name in shared.items()}
    tensors = {module: dict(values) for module in layouts}
    for (module, tensor), name in found.items():
        if tensor not in shared:
            tensors.setdefault(module, {})[tensor] = reader.read(name)
    return layouts, tensors


def _expected_shapes(
    modules: Mapping[str, Module], layouts: Mapping[str, Layout], config: BaseConfig
) -> tuple[_Shapes, _Shapes]:
    """_Shapes of the tensors that must be there, and of those that may."""
    required: _Shapes = {}
    optional: _Shapes = {}
    shared = config.shared_shapes(layouts.values())
    required |= {(SHARED, name): shape for name, shape in shared.items()}
    for module, layout in layouts.items():
        of_layer = config.layer_shapes(module, layout)
        required |= {(module, name): shape for name, shape in of_layer.items()}
        optional |= {(module, name): shape for name, shape in shared.items()}
        if not layout.experts:
            optional[module, "base_layer.weight"] = layout.weight_shape
    for name, module in modules.items():
        if module.is_parameter:
            if is_saved(name, config.modules_to_save):
                raise UnsupportedConfigError(
                    f"modules_to_save={config.modules_to_save!r} has the parameter {name}: whole "
                    f"stacks of experts are unsupported. {MERGE_IN_PEFT}"
                )
        elif is_saved(name, config.modules_to_save) and name not in layouts:
            required |= {(name, p): shape for p, shape in module.shapes.items()}
        elif getattr(config, "bias", "none") != "none" and "bias" in module.shapes:
            key = "base_layer.bias" if name in layouts else "bias"
            optional[name, key] = module.shapes["bias"]
    return required, optional


def _is_target(name: str, module: Module, config: BaseConfig) -> bool:
    """Whether a module or a parameter is adapted; PEFT's other fields select modules only."""
    if module.is_parameter:
        return is_named(name, getattr(config, "target_parameters", None))
    return config.is_target(name)


def _check_architecture(modules: Mapping[str, Module], found: list[str]) -> None:
    parents = {name.rpartition(".")[0] for name, module in modules.items() if module.is_parameter}
    if not found or any(name in modules or name in parents for name in found):
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


def _check_tied(modules: Mapping[str, Module], config: BaseConfig, tied: Tied | None) -> None:
    """Raises UnsupportedConfigError if an adapter changes one of two modules with one weight."""
    saved = [m for m in tied or () if is_saved(m, config.modules_to_save)]
    targets = [m for m in tied or () if config.is_target(m)]
    if tied is None or not (saved or targets):
        return
    embedding, head = tied
    if config.ensure_weight_tying:
        if targets:
            raise UnsupportedConfigError(
                f"ensure_weight_tying=True of the adapted {embedding}, one adapter of a tied "
                f"embedding and head: unsupported. {MERGE_IN_PEFT}"
            )
    elif saved or (head in targets and head not in modules):
        field = "modules_to_save" if saved else "target_modules"
        raise UnsupportedConfigError(
            f"{field} has {(saved or targets)[0]} alone: PEFT gave it a weight of its own, and in "
            f"this model {embedding} and {head} have one. Load a base that does not tie them "
            "(tie_word_embeddings false, and a head in its files), or train with "
            "ensure_weight_tying."
        )


def _check_names(modules: Mapping[str, Module], layers: list[str], config: BaseConfig) -> None:
    """Raises ValueError if something that the configuration names is not there."""
    all_layers = [m for m, x in modules.items() if x.is_layer and not x.is_parameter]
    targets, parameters = config.target_modules, getattr(config, "target_parameters", None)
    stacks = [m for m, module in modules.items() if module.is_parameter]
    if parameters and not stacks:
        raise UnsupportedConfigError(
            f"target_parameters={list(parameters)!r} of adapter_config.json are stacks of experts, "
            "and names has no parameter that is one: they are read into an nnx.Einsum with an axis "
            f"of experts. {MERGE_IN_PEFT}"
        )
    is_there = lambda target: any(is_named(m, (target,)) for m in stacks)
    _check_each("target_parameters", parameters or (), is_there, stacks)
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
    # Layers that are named in whole may be of any number.
    named = [m for m in all_layers if is_named(m, targets) and m not in (targets or ())]
    for number in as_tuple(config.layers_to_transform) if named else ():
        if number not in map(config.layer_of, named):
            pattern = config.layers_pattern
            beside = f" with layers_pattern={pattern!r}" if pattern else ""
            raise ValueError(
                f"layers_to_transform={number}{beside} of adapter_config.json selects none of "
                f"{_some(named)}."
            )
    saved = as_tuple(config.modules_to_save)
    is_there = lambda name: any(is_saved(m, (name,)) for m in modules)
    of_task = _HEADS_OF_TASKS.get(str(config.others.get("task_type")), ())
    if any(map(is_there, of_task)):
        saved = tuple(name for name in saved if name not in of_task)
    _check_each("modules_to_save", saved, is_there, modules)
    for selection in config.selections(all_layers, layers):
        _check_each(selection.field, selection.names, selection.is_there, selection.layers)
    excluded = config.exclude_modules or ()
    join = lambda *parts: ".".join(parts)
    containers = {part for m in modules for part in itertools.accumulate(m.split("."), join)}
    for name in as_tuple(excluded):
        exclusion = name if isinstance(excluded, str) else (name,)
        if not any(is_named(part, exclusion) for part in containers):
            warnings.warn(
                f"exclude_modules={name!r} of adapter_config.json excludes nothing of the model.",
                stacklevel=4,
            )


def _warn_of_square_experts(layouts: Mapping[str, Layout], config: BaseConfig) -> None:
    """Warns of files of an old PEFT whose shapes do not show which of the factors is the first."""
    sides = [(layout.d_in, layout.d_out) for layout in layouts.values() if layout.experts]
    version = str(config.others.get("peft_version"))
    numbers = [int(n) for n in re.findall(r"\d+", version)]
    if sides and all(d_in == d_out for d_in, d_out in sides) and [] < numbers[:3] < [0, 19, 1]:
        warnings.warn(
            f"this adapter of square experts was written by PEFT {version}. Before 0.19.1 PEFT "
            "read a stack [experts, out, in] as [experts, in, out]: if the stacks of its model are "
            "so, the change here is transposed.",
            stacklevel=4,
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


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
