"""Attaching an adapter that Hugging Face PEFT (or `save_peft`) wrote to a Flax model."""

from collections.abc import Iterator, Mapping
import contextlib
import os
import pathlib
import re
from typing import Any, NamedTuple
import warnings

from flax import nnx
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.adapted_layers import adapted_layers
from lowrank_optax.adapters.attaching import attach
from lowrank_optax.adapters.base import Adapter
from lowrank_optax.adapters.own_values import (
    check_can_claim,
    claim,
    live_in,
    parameters_of,
    values_of,
)
from lowrank_optax.adapters.peft.config import (
    CONFIG_FILE,
    MERGE_IN_PEFT,
    PeftConfig,
    UnsupportedConfigError,
    parse_config,
    read_json,
)
from lowrank_optax.adapters.peft.expected import (
    Expected,
    expected_tensors,
    file_shapes,
    read_tensors,
)
from lowrank_optax.adapters.peft.forms import method_of
from lowrank_optax.adapters.peft.matching import alpha_of, rank_of, scale_of
from lowrank_optax.adapters.peft.module_names import ModuleNames, Slot, module_slots
from lowrank_optax.adapters.peft.tied import may_be_tied, tied_in_model
from lowrank_optax.adapters.switching import deactivate
from lowrank_optax.matrices.selection import Path, path_string


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
    pattern, ``modules_to_save`` and trained biases, of linear layers, embeddings and convolutions.
    Everything is compared before anything is attached: the file's tensors must be those that its
    configuration asks of this model. Layers that the model has stacked are stacked.

    Values of ``modules_to_save`` and biases stand in the model's parameters, as those of
    `also_train`, while the adapter is active. Only one of two adapters with values of one parameter
    can be: the one that was there is deactivated.

    Args:
      model: An NNX model with the weights of the adapter's base model.
      path: The folder, with adapter_config.json and adapter_model.safetensors.
      name: What the adapter is called in the model.
      names: What PyTorch calls the modules, as for `save_peft`.
      rngs: Source of dropout.

    Returns:
      The model itself. The adapter's arrays are float32.

    Warns:
      UserWarning: Another adapter with values of its own of the same parameters is deactivated.

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
    folder = pathlib.Path(path)
    config = parse_config(read_json(folder), str(folder / CONFIG_FILE))
    slots = module_slots(model, names)
    tied = tied_in_model(model, slots)
    expected = expected_tensors(slots, config, file_shapes(folder), tied)
    _check_orientation(expected, config)
    tensors = read_tensors(folder, expected)
    with values_of(model, name):  # not those of other adapters
        values = _own_values(expected, tensors)
    for embedding in {m for m in tensors if "weight" in tensors[m]} & slots.keys():
        if isinstance(slots[embedding].module, nnx.Embed) and may_be_tied(model, slots, embedding):
            warnings.warn(
                f"modules_to_save has {embedding}. If its table is the head's too in this model, "
                "the head changes with it, as in PEFT only with ensure_weight_tying=True.",
                stacklevel=2,
            )
    if config.init_lora_weights == "pissa" and config.lora_dropout:
        warnings.warn(
            f"lora_dropout={config.lora_dropout} is left out: PiSSA has no dropout here.",
            stacklevel=2,
        )
    others = live_in(model, {one.path for one in values})
    check_can_claim(model, {one.path for one in values})
    _check_owners(model, others)
    # PiSSA decomposes the weight of the model; of another method the file's base is the weight.
    bases = [] if config.init_lora_weights == "pissa" else [x for x in values if not x.trained]
    with _standing_in(bases):
        _attach(model, name, config, expected.layers, tensors, rngs)
    if others:
        deactivate(model, *others)
        warnings.warn(
            f"{', '.join(sorted({p for paths in others.values() for p in paths}))}: {name!r} has "
            f"values of its own, and so has {', '.join(map(repr, others))}, which is deactivated: "
            "`activate` one of them.",
            stacklevel=2,
        )
    _set_parameters(model, name, values)
    return model


def _attach(
    model: Any,
    name: str,
    config: PeftConfig,
    layers: Mapping[str, Slot],
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    rngs: nnx.Rngs | int,
) -> None:
    by_path: dict[tuple[str, ...], list[str]] = {}
    for module, slot in layers.items():
        by_path.setdefault(slot.path, []).append(module)
    method = method_of(config)
    ranks, alphas, places = {}, {}, {}
    for path, modules in by_path.items():
        pattern = f"^{re.escape(path_string(path))}$"
        places[path] = _Place(path, {m: layers[m] for m in modules}, config)
        ranks[pattern] = places[path].ranks()
        alphas[pattern] = alpha_of(modules[0], config)
        places[path].check(method)
    where = lambda path, layer: tuple(map(str, path)) in by_path
    attach(model, method, where, rngs=rngs, name=name, rank_pattern=ranks, alpha_pattern=alphas)
    for place in places.values():
        place.fill(name, tensors)


class _Place:
    """A Flax layer, or stack of them, and PyTorch's modules that are adapted in it."""

    def __init__(self, path: tuple[str, ...], slots: dict[str, Slot], config: PeftConfig) -> None:
        self.path, self.slots, self.config = path, slots, config
        self.module = next(iter(slots.values())).module
        self.rank_of = {slot.index: rank_of(m, config) for m, slot in slots.items()}
        self.scale_of = {slot.index: scale_of(m, config) for m, slot in slots.items()}

    def batch(self) -> tuple[int, ...]:
        axes = len(next(iter(self.rank_of)))
        parameter = next(x for x in vars(self.module).values() if isinstance(x, nnx.Param))
        return parameter.shape[:axes]

    def ranks(self) -> int | tuple[int, ...]:
        """One rank, or one for each layer of the stack if ranks or scales differ."""
        indices = list(np.ndindex(self.batch()))
        ranks, scales = set(self.rank_of.values()), set(self.scale_of.values())
        if len(self.rank_of) == len(indices) and len(ranks) == len(scales) == 1:
            return ranks.pop()
        return tuple(self.rank_of.get(index, 1) for index in indices)

    def check(self, method: Adapter) -> None:
        """Layers of a stack without an adapter have one of scale zero, where that is nothing."""
        whole = len(self.rank_of) == np.prod(self.batch(), dtype=int)
        if not whole and (self.config.use_dora or self.config.init_lora_weights == "pissa"):
            raise UnsupportedConfigError(
                f"{type(method).__name__} of {len(self.rank_of)} of the {np.prod(self.batch())} "
                f"layers stacked at {path_string(self.path)}: load it into a model whose layers "
                "are not stacked."
            )

    def fill(self, name: str, tensors: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Sets the adapter's arrays to the file's tensors."""
        arrays = self.module.adapters[name].arrays
        values = {k: np.zeros(v.shape, v.dtype) for k, v in arrays.items() if k in ("A", "B")}
        for key in ("magnitude", "rank_scale"):
            if key in arrays:
                values[key] = np.zeros(arrays[key].shape, arrays[key].dtype)
        for module, slot in self.slots.items():
            layout, rank = slot.layout(), self.rank_of[slot.index]
            assert layout is not None  # only layers are targets
            a, b = layout.unpack(tensors[module])
            values["A"][slot.index][:, :rank], values["B"][slot.index][:rank] = a, b
            if "magnitude" in values:
                magnitude = tensors[module]["lora_magnitude_vector"]
                values["magnitude"][slot.index] = magnitude.reshape(-1)
            if "rank_scale" in values:
                values["rank_scale"][slot.index][:rank] = self.scale_of[slot.index]
        for key, value in values.items():
            arrays[key].set_value(jnp.asarray(value))


class _Values(NamedTuple):
    """Values of the model's own parameters that a file holds.

    Attributes:
      slot: The module.
      parameter: PyTorch's name of the parameter.
      value: Its tensor.
      trained: Whether it is trained on; the base of an adapted embedding is not.
    """

    slot: Slot
    parameter: str
    value: np.ndarray
    trained: bool

    @property
    def variable(self) -> Any:
        return getattr(self.slot.module, self.slot.parameters()[self.parameter])

    @property
    def path(self) -> Path:
        return (*self.slot.path, self.slot.parameters()[self.parameter])


def _check_orientation(expected: Expected[Slot], config: PeftConfig) -> None:
    """A square weight of transformers' Conv1D cannot be told from a Linear's."""
    for module, tensor in expected.shapes if config.fan_in_fan_out else ():
        layout = expected.modules[module].layout() if tensor == "weight" else None
        if layout and layout.kind == "linear" and layout.d_in == layout.d_out:
            raise UnsupportedConfigError(
                f"fan_in_fan_out=True with {module} in modules_to_save, a square weight, which "
                f"PyTorch may hold as [in, out] or [out, in]: unsupported. {MERGE_IN_PEFT}"
            )


def _own_values(
    expected: Expected[Slot], tensors: Mapping[str, Mapping[str, np.ndarray]]
) -> list[_Values]:
    """What the file holds of the model's own parameters, but for bases that are the model's."""
    found = []
    for module, of_module in tensors.items():
        if module not in expected.modules:
            continue  # a head that is tied to its embedding
        for tensor, value in of_module.items():
            parameter = tensor.removeprefix("base_layer.")
            if parameter not in ("weight", "bias"):
                continue
            one = _Values(expected.modules[module], parameter, value, tensor != "base_layer.weight")
            if one.trained or (one.slot.cast(parameter, value) != one.slot.read(parameter)).any():
                found.append(one)
    return found


@contextlib.contextmanager
def _standing_in(values: list[_Values]) -> Iterator[None]:
    """While open, the parameters have these values; what is computed from them is the file's."""
    before = [(one.variable, one.variable.get_value()) for one in values]
    for one in values:
        one.slot.write(one.parameter, one.value)
    try:
        yield
    finally:
        for variable, value in reversed(before):
            variable.set_value(value)


def _check_owners(model: Any, owners: Mapping[str, list[str]]) -> None:
    for path, layer in adapted_layers(model).items():
        for adapter in layer.adapters.values():
            if adapter.merged and adapter.name in owners:
                raise ValueError(
                    f"{owners[adapter.name][0]} has values of the adapter {adapter.name!r}, which "
                    f"is merged into {path_string(path)}, and the file has others: unmerge the "
                    "model first."
                )


def _set_parameters(model: Any, name: str, values: list[_Values]) -> None:
    parameters = parameters_of(model)
    for trained in (False, True):
        paths = {one.path for one in values if one.trained is trained}
        claim(model, {path: parameters[path] for path in paths}, name, trained=trained)
    for one in values:
        one.slot.write(one.parameter, one.value)
