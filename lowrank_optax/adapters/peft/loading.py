"""Attaching an adapter that Hugging Face PEFT (or `save_peft`) wrote to a Flax model."""

from collections.abc import Iterator, Mapping
import contextlib
import math
import os
import pathlib
import re
from typing import Any
import warnings

from flax import nnx
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.adapted_layers import check_weights
from lowrank_optax.adapters.attaching import attach
from lowrank_optax.adapters.own_values import check_can_claim, claim, live_in, values_of
from lowrank_optax.adapters.peft.config import AttachedConfig, PeftConfig, UnsupportedConfigError
from lowrank_optax.adapters.peft.module_names import (
    ModuleNames,
    Slot,
    module_slots,
    saved_layers,
    sharding_kept,
    warn_of_heads,
)
from lowrank_optax.adapters.peft.tensors import Tensors
from lowrank_optax.adapters.peft.weight_folding import CheckedAdapter, FlaxBase
from lowrank_optax.adapters.switching import deactivate, disabled
from lowrank_optax.matrices.selection import Path, path_string

# Modules, PyTorch's names of their parameters, and tensors.
Values = list[tuple[Slot, str, np.ndarray]]


def load_peft(
    model: nnx.Module,
    path: str | os.PathLike,
    *,
    name: str = "default",
    names: ModuleNames | None = None,
    rngs: nnx.Rngs | int = 0,
) -> nnx.Module:
    """Attaches the adapter in a folder of Hugging Face PEFT to a model, in place.

    Reads LoRA, rsLoRA, DoRA and PiSSA, with regular expressions, lists, ranks and alphas by
    pattern, ``modules_to_save`` and trained biases, of linear layers, embeddings and convolutions;
    LoRA of stacks of experts (``target_parameters``), here ``nnx.Einsum`` with an axis of experts;
    and VeRA, MiSS (as `MiSS` or `MiSSBat`, also by its old name Bone) and RandLoRA of linear
    layers. `fold_peft` reads more kinds, and attaches nothing.
    Everything is compared before anything is attached: the file's tensors must be those that its
    configuration requires of this model. Layers that the model has stacked are stacked.

    While the adapter is active, the model's parameters have the file's values of
    ``modules_to_save`` and biases, as those of `also_train`. Only one of two adapters with values
    of one parameter can be active: the earlier one is deactivated.

    Args:
      model: An NNX model with the weights of the adapter's base model.
      path: The folder, with adapter_config.json and adapter_model.safetensors.
      name: Name of the adapter in the model.
      names: What PyTorch calls the modules, as for `save_peft`.
      rngs: Source of dropout.

    Returns:
      The model itself. The adapter's arrays are float32.

    Warns:
      UserWarning: Another adapter with values of its own of the same parameters is deactivated; or
        PEFT before 0.19.1 wrote an adapter of square experts, perhaps transposed.

    Raises:
      ImportError: safetensors is not installed.
      FileNotFoundError: There is no such file in the folder.
      UnsupportedConfigError: A field that changes what the adapter computes has a value that is
        not supported; the message names them.
      CheckpointMismatchError: The file is damaged or truncated, or tensors are missing, unknown or
        of other shapes; all of them are listed.
      ValueError: A file is damaged or pickled, or the configuration selects no layer of the model.

    Example:
      See `save_peft`.
    """
    slots = module_slots(model, names)
    adapter = CheckedAdapter(pathlib.Path(path), FlaxBase(model, slots))
    config, layouts, tensors = adapter.config, adapter.layouts, adapter.tensors
    if not isinstance(config, AttachedConfig):
        raise UnsupportedConfigError(
            f"{path}: peft_type={config.peft_type!r} cannot be attached. Fold it into the weights "
            "instead: lro.adapters.fold_peft(model, path)."
        )
    saved = {slot.path: slot.module for slot in saved_layers(config, slots, tensors)}
    check_weights(model, saved, "load_peft writes")
    with values_of(model, name):  # not those of other adapters
        trained, bases = _own_values(slots, tensors)
    warn_of_heads(model, slots, (m for m in tensors if "weight" in tensors[m]))
    if isinstance(config, PeftConfig) and config.is_pissa and config.lora_dropout:
        warnings.warn(
            f"lora_dropout={config.lora_dropout} is left out: PiSSA has no dropout here.",
            stacklevel=2,
        )
    paths = {slot.path_of(parameter) for slot, parameter, _ in bases + trained}
    check_can_claim(model, paths)
    others = {owner: of for owner, of in live_in(model, paths).items() if owner != name}
    # `disabled` refuses merged adapters before the model is changed. PiSSA decomposes the weight
    # of the model; of another method the file's base is the weight.
    with (
        disabled(model, *others) if others else contextlib.nullcontext(),
        _standing_in([] if config.is_pissa else bases),
    ):
        _attach(model, name, config, {m: slots[m] for m in layouts}, tensors, rngs)
    if others:
        deactivate(model, *others)
        warnings.warn(
            f"{', '.join(sorted({p for paths in others.values() for p in paths}))}: {name!r} has "
            f"values of its own, and so has {', '.join(map(repr, others))}, which is deactivated: "
            "`activate` one of them.",
            stacklevel=2,
        )
    for values in (bases, trained):
        variables = {slot.path_of(p): slot.variable(p) for slot, p, _ in values}
        claim(model, variables, name, trained=values is trained)
        for slot, parameter, value in values:
            slot.write(parameter, value)
    return model


def _attach(
    model: Any,
    name: str,
    config: AttachedConfig,
    layers: Mapping[str, Slot],
    tensors: Mapping[str, Tensors],
    rngs: nnx.Rngs | int,
) -> None:
    by_path: dict[Path, dict[str, Slot]] = {}
    for module, slot in layers.items():
        by_path.setdefault(slot.path, {})[module] = slot
    pattern = {path: f"^{re.escape(path_string(path))}$" for path in by_path}
    alphas = {}
    if isinstance(config, PeftConfig):
        alphas = {pattern[p]: config.alpha_of(next(iter(g))) for p, g in by_path.items()}
    attach(
        model,
        config.method(),
        lambda path, layer: tuple(map(str, path)) in by_path,
        rngs=rngs,
        name=name,
        rank_pattern={pattern[path]: _ranks(config, group) for path, group in by_path.items()},
        alpha_pattern=alphas,
    )
    for group in by_path.values():
        adapter = next(iter(group.values())).adapters[name]
        arrays, values, shared = adapter.arrays, {}, {}
        for module, slot in group.items():
            layout = slot.layout
            assert layout is not None  # only layers are targets
            of_layer = config.arrays(layout, tensors[module])
            shared = config.shared_arrays(layout, tensors[module])
            if "rank_scale" in arrays:
                shape = (*layout.experts, config.rank_of(module))
                of_layer["rank_scale"] = np.full(shape, config.scale_of(module))
            for key, x in of_layer.items():
                zeros = np.zeros(arrays[key].shape, arrays[key].dtype)
                own = values.setdefault(key, zeros)[slot.index]
                own[tuple(map(slice, x.shape))] = x  # beyond a layer's own rank is padding
        variables = [(arrays[key], value) for key, value in values.items()]
        for key, value in shared.items():
            variables.append((model.adapter_groups[name][adapter.group][key], value))
        for variable, value in variables:
            with sharding_kept(variable):
                variable.set_value(jnp.asarray(value))


def _ranks(config: AttachedConfig, group: Mapping[str, Slot]) -> int | tuple[int, ...]:
    """The rank of a Flax layer, or one for each layer of a stack if ranks or scales differ.

    Layers of the stack without an adapter have one of scale zero.

    Raises:
      UnsupportedConfigError: If they cannot have one.
    """
    slot = next(iter(group.values()))
    ranks = {slot.index: config.rank_of(module) for module, slot in group.items()}
    layers = list(np.ndindex(slot.stack))
    if len(group) < len(layers) and not config.may_skip_layers:
        raise UnsupportedConfigError(
            f"{type(config.method()).__name__} of {len(group)} of the {len(layers)} layers stacked "
            f"at {path_string(slot.path)}: load it into a model whose layers are not stacked."
        )
    scales = {config.scale_of(module) for module in group}
    if len(group) == len(layers) and len(set(ranks.values())) == len(scales) == 1:
        return ranks[slot.index]
    return tuple(ranks.get(index, 1) for index in layers for _ in range(math.prod(slot.experts)))


def _own_values(slots: Mapping[str, Slot], tensors: Mapping[str, Tensors]) -> tuple[Values, Values]:
    """Trained values of the model's own parameters, and bases that are not the model's."""
    trained, bases = [], []
    for module, of_module in tensors.items():
        if module not in slots:
            continue  # a head that is tied to its embedding
        slot = slots[module]
        for tensor, value in of_module.items():
            if tensor in ("weight", "bias", "base_layer.bias"):
                trained.append((slot, tensor.removeprefix("base_layer."), value))
            elif tensor == "base_layer.weight":
                own = slot.read("weight")
                if (value.astype(own.dtype) != own).any():
                    bases.append((slot, "weight", value))
    return trained, bases


@contextlib.contextmanager
def _standing_in(values: Values) -> Iterator[None]:
    """While open, the parameters have these values."""
    variables = [slot.variable(parameter) for slot, parameter, _ in values]
    before = [variable.get_value() for variable in variables]
    for slot, parameter, value in values:
        slot.write(parameter, value)
    try:
        yield
    finally:
        for variable, value in zip(reversed(variables), reversed(before), strict=True):
            variable.set_value(value)
