"""The modules of a base model, or of an adapter alone, as its files show them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lowrank_optax.adapters.peft.layouts import Layout

Shapes = Mapping[str, tuple[int, ...]]

# Types of models in whose layers transformers' Conv1D stores weights as [in, out]; their heads are
# Linear.
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


class FileModule(NamedTuple):
    """A module as files show it.

    Attributes:
      parameters: Shapes of its own tensors: ``weight``, ``bias``, ....
      adapter: Shapes of the tensors that an adapter has for it.
      inputs_first: Whether the weight may be stored as [in, out]; its shape decides, unless it is
        square.
    """

    parameters: Shapes
    adapter: Shapes
    inputs_first: bool = False

    @property
    def is_layer(self) -> bool:
        """Whether adapters can be attached to it."""
        return 2 <= len(self.parameters.get("weight", ())) <= 5

    def shapes(self) -> Shapes:
        """PyTorch's shapes of its parameters."""
        return self.parameters

    def layout(self) -> Layout | None:
        """How its weight lies; None if it is no layer that adapters can be attached to."""
        if not self.is_layer:
            return None
        shape = self.parameters["weight"]
        if len(shape) > 2:
            return Layout("convolution", int(np.prod(shape[1:])), shape[0], shape[2:])
        outputs, inputs = shape
        if "lora_embedding_A" in self.adapter:
            return Layout("embedding", outputs, inputs)
        if self.inputs_first and self._outputs() in (None, inputs):
            return Layout("linear", outputs, inputs, inputs_first=True)
        return Layout("linear", inputs, outputs)

    def _outputs(self) -> int | None:
        shape = self.adapter.get("lora_B.weight")
        return shape[0] if shape else None


def modules_of_base(
    shapes: Shapes, adapter: Mapping[str, Shapes], config: Mapping[str, Any], fan_in_fan_out: bool
) -> dict[str, FileModule]:
    """The modules of a base model by name.

    Args:
      shapes: Shapes of its tensors.
      adapter: Shapes of an adapter's tensors, by module and what follows its name.
      config: Fields of its config.json; the model_type decides how weights are stored.
      fan_in_fan_out: The field of the adapter's configuration, used where there is no model_type
        or it is that of a custom program (auto_map). PEFT ignores the field in a Linear.
    """
    own: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        own.setdefault(module, {})[parameter] = shape
    return {
        module: FileModule(
            of, adapter.get(module, {}), _may_be_conv1d(module, config, fan_in_fan_out)
        )
        for module, of in own.items()
    }


def _may_be_conv1d(module: str, config: Mapping[str, Any], fan_in_fan_out: bool) -> bool:
    """Whether the module is a Conv1D of transformers if its weight is a matrix."""
    if not any(part.isdecimal() for part in module.split(".")):
        return False  # not of a layer
    part = config.get(module.partition(".")[0])  # of a model made of two
    kind = part.get("model_type") if isinstance(part, Mapping) else None
    kind = kind or config.get("model_type")
    if kind is None or "auto_map" in config:  # nobody knows, or a program of the model's own
        return fan_in_fan_out
    return kind in _CONV1D_TYPES


def modules_of_adapter(adapter: Mapping[str, Shapes]) -> dict[str, FileModule]:
    """The modules that an adapter's tensors ask for, where there is no base to compare with.

    Raises:
      ValueError: If one has tensors of an adapter, but not both of its factors.
    """
    return {module: _module_of(module, shapes) for module, shapes in adapter.items()}


def _module_of(module: str, shapes: Shapes) -> FileModule:
    if not any(name.startswith("lora_") for name in shapes):
        return FileModule(shapes, {})
    names = ("lora_embedding_A", "lora_embedding_B")
    if "lora_embedding_A" not in shapes:
        names = ("lora_A.weight", "lora_B.weight")
    a, b = (shapes.get(name, ()) for name in names)
    if len(a) < 2 or len(b) < 2:
        raise ValueError(
            f"the adapter of {module} has {', '.join(sorted(shapes))}, and not both of its factors "
            f"{' and '.join(names)}."
        )
    parameters = {"weight": (a[1], b[0]) if "embedding" in names[0] else (b[0], *a[1:])}
    if "base_layer.bias" in shapes:
        parameters["bias"] = (b[0],)
    return FileModule(parameters, shapes)
