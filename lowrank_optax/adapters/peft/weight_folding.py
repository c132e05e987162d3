"""Folding an adapter's folder into weights, of a Flax model or of files."""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.adapted_layers import (
    check_weights,
    set_weight_matrix,
    weight_matrix,
    weight_variable,
)
from lowrank_optax.adapters.methods.lora import LoRA
from lowrank_optax.adapters.methods.pissa import PiSSA
from lowrank_optax.adapters.peft.base_files import modules_of_adapter
from lowrank_optax.adapters.peft.checking import Module, checked_tensors
from lowrank_optax.adapters.peft.config import (
    CONFIG_FILE,
    PeftConfig,
    UnsupportedConfigError,
    read_json,
)
from lowrank_optax.adapters.peft.kinds import FoldedConfig
from lowrank_optax.adapters.peft.module_names import (
    ModuleNames,
    Slot,
    module_slots,
    saved_layers,
    sharding_kept,
    tied_in_model,
    warn_of_heads,
)
from lowrank_optax.adapters.peft.parsing import parse_config
from lowrank_optax.adapters.peft.tensors import Shapes, Tied, open_tensors, shapes_by_module
from lowrank_optax.matrices.selection import path_string
from lowrank_optax.modules.select import modules_by_path


def fold_peft(
    model: nnx.Module, path: str | os.PathLike, *, names: ModuleNames | None = None
) -> nnx.Module:
    """Folds the adapter in a folder of Hugging Face PEFT into a model's weights, in place.

    The model has no adapter afterwards, and its weights are those of PEFT's ``merge_and_unload``.
    Reads what `load_peft` reads, and kinds that are not trained here, of linear layers: AdaLoRA,
    LoHa, LoKr, IA3, OFT, MiSS (also by its old name Bone), VeRA and RandLoRA. Values of
    ``modules_to_save`` and biases become the model's. The result is computed in float32 and
    rounded once to the weight's dtype. Everything is compared before any weight is changed. A
    second call with the same folder folds it a second time.

    Args:
      model: An NNX model with the weights of the adapter's base model.
      path: The folder, with adapter_config.json and adapter_model.safetensors.
      names: What PyTorch calls the modules, as for `save_peft`.

    Returns:
      The model itself.

    Warns:
      UserWarning: A changed embedding may be the model's head too; or PEFT before 0.19.1 wrote an
        adapter of square experts, perhaps transposed.

    Raises:
      ImportError: safetensors is not installed.
      FileNotFoundError: There is no such file in the folder.
      UnsupportedConfigError: A field that changes what the adapter computes has a value that is
        not supported; the message names them.
      CheckpointMismatchError: The file is damaged or truncated, or tensors are missing, unknown or
        of other shapes; all of them are listed.
      ValueError: The model has adapters; a file is damaged or pickled; the configuration selects no
        layer of the model; a changed embedding is tied to the model's head; or this is called
        under ``jit``.
      TypeError: A changed layer multiplies by another weight than its parameter.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> model, names = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0))), {"layers/{}": "{}"}
      >>> method, folder = lro.adapters.LoRA(rank=1, initial="random"), tempfile.mkdtemp()
      >>> y = lro.adapters.attach(model, method, rngs=0)(jnp.ones(4))
      >>> lro.adapters.save_peft(model, folder, names=names)
      >>> _ = lro.adapters.fold_peft(lro.adapters.detach(model), folder, names=names)
      >>> print(bool(jnp.allclose(model(jnp.ones(4)), y, atol=1e-6)))
      True
    """
    has_own = lambda module: bool(
        getattr(module, "adapters", None) or getattr(module, "own_values", None)
    )
    if adapted := modules_by_path(model, has_own):
        raise ValueError(
            f"the model has adapters at {', '.join(path_string(p) for p in list(adapted)[:5])}, "
            "which belong to the weights that would be changed: `detach` them first."
        )
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(nnx.state(model))):
        raise ValueError("fold_peft reads files, which a traced model cannot: call it outside jit.")
    slots = module_slots(model, names)
    checked = CheckedAdapter(Path(path), FlaxBase(model, slots))
    checked.check_not_tied()
    changed = saved_layers(checked.config, slots, checked.tensors)
    changed += [slots[module] for module in checked.layouts]
    check_weights(model, {slot.path: slot.module for slot in changed}, "folding changes")
    saved = (m for m, of_module in checked.tensors.items() if "weight" in of_module)
    warn_of_heads(model, slots, (*saved, *checked.layouts))
    by_layer: dict[Any, dict[str, Slot]] = {}
    for module in checked.layouts:
        by_layer.setdefault(slots[module].path, {})[module] = slots[module]
    for of_layer in by_layer.values():
        _fold(checked, of_layer)
    for module in checked.tensors:
        if module in slots:  # not a head that is tied to its embedding
            for parameter, value in checked.trained(module).items():
                slots[module].write(parameter, value)
    return model


def _fold(checked: "CheckedAdapter", slots: Mapping[str, Slot]) -> None:
    """Folds the adapters of one Flax layer, or of the layers in its stack, into its parameters."""
    layer = next(iter(slots.values())).module
    matrices = np.array(weight_matrix(layer))
    for module, slot in slots.items():
        layout = checked.layouts[module]
        weight = checked.folded_weight(module, layout.pack_weight(matrices[slot.index]))
        matrices[slot.index] = layout.unpack_weight(weight)
        if checked.changes_bias(module) and "bias" in slot.parameters:
            slot.write("bias", checked.folded_bias(module, slot.read("bias")))
    with sharding_kept(weight_variable(layer)):
        set_weight_matrix(layer, jnp.asarray(matrices))


class Base(Protocol):
    """A base model."""

    def modules(
        self, adapter: Mapping[str, Shapes], fan_in_fan_out: bool
    ) -> tuple[Mapping[str, Module], Tied | None]:
        """Its modules by PyTorch's names, and which of them are tied.

        Args:
          adapter: Shapes of the adapter's tensors, by module and what follows its name.
          fan_in_fan_out: The field of the adapter's configuration.
        """


class FlaxBase(NamedTuple):
    """A Flax model as a base."""

    model: nnx.Module
    slots: Mapping[str, Slot]

    def modules(
        self, adapter: Mapping[str, Shapes], fan_in_fan_out: bool
    ) -> tuple[Mapping[str, Module], Tied | None]:
        """See `Base.modules`."""
        del adapter, fan_in_fan_out
        return self.slots, tied_in_model(self.model, self.slots)


class CheckedAdapter:
    """An adapter of any kind in a folder, after it has been compared with a base.

    Parameters are PyTorch's tensors.

    Attributes:
      content: Fields of its adapter_config.json.
      config: The configuration.
      layouts: Layouts of the adapted layers by module.
      tensors: Tensors by module and what follows its name.
      tied: Which modules of the base are tied.

    Raises:
      ValueError: If the adapter is not supported, damaged, or of another base.
    """

    def __init__(self, folder: Path, base: Base | None) -> None:
        self.content = read_json(folder)
        self.config = parse_config(self.content, str(folder / CONFIG_FILE))
        if not isinstance(base, FlaxBase) and getattr(self.config, "target_parameters", None):
            raise UnsupportedConfigError(
                f"{folder / CONFIG_FILE} has target_parameters={self.content['target_parameters']},"
                " and files do not show the order in which PyTorch registers parameters: load it "
                "into a Flax model (lro.adapters.load_peft, lro.adapters.fold_peft)."
            )
        if base is None and self.config.needs_base:
            raise ValueError(
                f"{self.config.needs_base}: its base is needed to convert it (--base)."
            )
        with open_tensors(folder) as reader:
            found, self.tied = shapes_by_module(reader), None
            if base is None:
                modules: Mapping[str, Module] = modules_of_adapter(found)
            else:
                modules, self.tied = base.modules(found, self.config.fan_in_fan_out)
            self.layouts, self.tensors = checked_tensors(reader, modules, self.config, self.tied)

    def check_not_tied(self) -> None:
        """Raises ValueError if it changes an embedding or a head that have one weight."""
        if self.tied and not self.layouts.keys().isdisjoint(self.tied):
            raise ValueError(
                f"{', '.join(m for m in self.tied if m in self.layouts)}: the base model ties its "
                "embedding and its head, and a change of one would become a change of both. Load "
                "the adapter beside the model instead: lro.adapters.load_peft(model, path)."
            )

    def trained(self, module: str) -> dict[str, np.ndarray]:
        """The module's own parameters that the file has trained values of."""
        tensors = self.tensors[module]
        if module not in self.layouts:
            return dict(tensors)
        return {"bias": tensors["base_layer.bias"]} if "base_layer.bias" in tensors else {}

    def folded_weight(self, module: str, weight: np.ndarray) -> np.ndarray:
        """A layer's weight with its adapter: computed in float32, rounded once."""
        layout = self.layouts[module]
        if isinstance(self.config, FoldedConfig):
            own = layout.unpack_weight(self._base_of(module, weight)).astype(np.float32)
            folded = self.config.folded(module, self._float32(module), own)
        else:
            method, p, base = self.lora(module, weight)
            folded = np.asarray(method.merged(p, base).weight)
        return layout.pack_weight(folded).astype(weight.dtype)

    def changes_bias(self, module: str) -> bool:
        """Whether `folded_bias` is another than the base's."""
        return isinstance(self.config, FoldedConfig) and self.config.changes_bias(module)

    def folded_bias(self, module: str, bias: np.ndarray) -> np.ndarray:
        """A layer's bias with its adapter: computed in float32, rounded once."""
        assert isinstance(self.config, FoldedConfig)  # as changes_bias says
        folded = self.config.folded_bias(self._float32(module), bias.astype(np.float32))
        return folded.astype(bias.dtype)

    def lora(
        self, module: str, weight: np.ndarray | None
    ) -> tuple[LoRA | PiSSA, dict[str, jax.Array], Any]:
        """The LoRA of a layer, its arrays and, if there is a base, the matrix they add to."""
        assert isinstance(self.config, PeftConfig)
        tensors, layout = self.tensors[module], self.layouts[module]
        method = self.config.method(module)
        own_arrays = self.config.arrays(layout, tensors)
        p = {name: jnp.asarray(x) for name, x in own_arrays.items()}
        if weight is None:
            return method, p, None
        own = self._base_of(module, weight)
        if layout.experts:  # of LoRA, whose arrays are all in the file
            return method, p, jnp.asarray(layout.unpack_weight(own))
        start, base = (jnp.asarray(layout.unpack_weight(x)) for x in (weight, own))
        # PiSSA decomposes the base model's weight, and the file's own base is the residual.
        start = start if self.config.is_pissa else base
        params = method.init(jax.random.key(0), start[None])
        p = method.layer_arrays(params, 0) | p
        if params.base is not None and "base_layer.weight" not in tensors:
            base = params.base[0]
        return method, p, base

    def factors(self, module: str, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Factors ``[d_in, r]`` and ``[r, d_out]`` of the change of the base model's weight.

        Raises:
          TypeError: If the change has none.
        """
        if not isinstance(self.config, FoldedConfig):
            method, p, _ = self.lora(module, weight)
            a, b = (np.asarray(x) for x in method.to_lora(p))
            return a, b
        layout = self.layouts[module]
        factors = self.config.factors(module, self._float32(module), layout.d_in, layout.d_out)
        if factors is None:
            raise TypeError(
                f"the change of {module} by peft_type={self.config.peft_type!r} is no product of "
                "thin factors: it cannot be a plain LoRA. Fold it into the base instead (--merge)."
            )
        return factors

    def _float32(self, module: str) -> dict[str, np.ndarray]:
        return {k: x.astype(np.float32, copy=False) for k, x in self.tensors[module].items()}

    def _base_of(self, module: str, weight: np.ndarray) -> np.ndarray:
        """The weight that the adapter is beside: the file's, if it has one."""
        return self.tensors[module].get("base_layer.weight", weight).astype(weight.dtype)
