"""The modules of a base model, or of an adapter alone, as its files show them."""

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

from lowrank_optax.adapters.peft.tensors import Layout, Shapes, Tied
from lowrank_optax.storage.fields import (
    BOOLEAN,
    NULL,
    OBJECT,
    POSITIVE_INTEGER,
    TEXT,
    list_of,
    wrong_fields,
)
from lowrank_optax.storage.safetensors_files import TensorReader

# Types of models in whose layers transformers' Conv1D stores weights as [in, out]; their heads are
# Linear.
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# Last names of embeddings and of heads.
_TABLES = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared")
_HEADS = ("lm_head", "embed_out", "output", "decoder")
# Parts of the names of architectures that predict tokens.
_PREDICTING = (
    "ForCausalLM", "LMHead", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining",
)  # fmt: skip
_KINDS = {
    "architectures": list_of(TEXT) | NULL,
    "model_type": TEXT | NULL,
    "text_config": OBJECT | NULL,
    "tie_word_embeddings": BOOLEAN | NULL,
    "vocab_size": POSITIVE_INTEGER | NULL,
}


class FileModule(NamedTuple):
    """A module as files show it.

    Attributes:
      shapes: Shapes of its own tensors: ``weight``, ``bias``, ....
      layout: Layout of its weight; None if it is not a layer.
    """

    shapes: Shapes
    layout: Layout | None

    @property
    def is_layer(self) -> bool:
        """Whether adapters can be attached to it."""
        return self.layout is not None

    @property
    def is_parameter(self) -> bool:
        """Files do not show in which order PyTorch registers parameters, so it is none."""
        return False


def modules_of_base(
    shapes: Shapes, adapter: Mapping[str, Shapes], config: Mapping[str, Any], fan_in_fan_out: bool
) -> dict[str, FileModule]:
    """The modules of a base model by name, from the shapes of its tensors and of an adapter's.

    The model_type in its config.json decides how weights are stored, and ``fan_in_fan_out`` where
    there is none or it is that of a custom program (auto_map). PEFT ignores the field in a Linear.
    """
    own: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        own.setdefault(module, {})[parameter] = shape
    return {
        module: FileModule(
            of,
            _layout(of, adapter.get(module, {}), _may_be_conv1d(module, config, fan_in_fan_out)),
        )
        for module, of in own.items()
    }


def _layout(shapes: Shapes, adapter: Shapes, inputs_first: bool) -> Layout | None:
    """The layout of a weight, [in, out] if ``inputs_first`` and the adapter's shape allows it."""
    weight = shapes.get("weight", ())
    if not 2 <= len(weight) <= 5:
        return None
    if len(weight) > 2:
        return Layout("convolution", math.prod(weight[1:]), weight[0], weight[2:])
    outputs, inputs = weight
    if "lora_embedding_A" in adapter:
        return Layout("embedding", outputs, inputs)
    adapted_outputs = (adapter.get("lora_B.weight") or (inputs,))[0]
    if inputs_first and adapted_outputs == inputs:
        return Layout("linear", outputs, inputs, inputs_first=True)
    return Layout("linear", inputs, outputs)


def _may_be_conv1d(module: str, config: Mapping[str, Any], fan_in_fan_out: bool) -> bool:
    """Whether the module is a Conv1D of transformers if its weight is a matrix."""
    if not any(part.isdecimal() for part in module.split(".")):
        return False  # not of a layer
    part = config.get(module.partition(".")[0])  # of a model made of two
    kind = part.get("model_type") if isinstance(part, Mapping) else None
    kind = kind or config.get("model_type")
    if kind is None or "auto_map" in config:
        return fan_in_fan_out
    return kind in _CONV1D_TYPES


def modules_of_adapter(adapter: Mapping[str, Shapes]) -> dict[str, FileModule]:
    """The modules that an adapter's tensors require, where there is no base to compare with."""
    modules = {}
    for module, shapes in adapter.items():
        if not any(name.startswith("lora_") for name in shapes):
            modules[module] = FileModule(shapes, _layout(shapes, {}, False))
            continue
        names = ("lora_A.weight", "lora_B.weight")
        if "lora_embedding_A" in shapes:
            names = ("lora_embedding_A", "lora_embedding_B")
        elif "lora_E" in shapes:  # of AdaLoRA
            names = ("lora_A", "lora_B")
        a, b = (shapes.get(name, ()) for name in names)
        if len(a) < 2 or len(b) < 2:
            raise ValueError(
                f"the adapter of {module} has {', '.join(sorted(shapes))}, and not both of its "
                f"factors {' and '.join(names)}."
            )
        own = {"weight": (a[1], b[0]) if "lora_embedding_A" in shapes else (b[0], *a[1:])}
        if "base_layer.bias" in shapes:
            own["bias"] = (b[0],)
        modules[module] = FileModule(own, _layout(own, shapes, False))
    return modules


def tied_in_files(config: Mapping[str, Any], reader: TensorReader) -> Tied | None:
    """The tied modules of a model's folder.

    A configuration that leaves `tie_word_embeddings` out has its type's default, which for most is
    true. So only one that says false, or a head with values of its own, shows that they are not
    tied; another table with as many rows, such as GPT-2's of positions, does not.
    """
    text = config.get("text_config")
    wrong = wrong_fields(config, _KINDS) or wrong_fields(text or {}, _KINDS)
    if wrong:
        raise ValueError(f"config.json of the base: {'; '.join(wrong)}.")
    both = [config, text or {}]
    said = [c["tie_word_embeddings"] for c in both if c.get("tie_word_embeddings") is not None]
    rows = next((c["vocab_size"] for c in both if c.get("vocab_size")), None)
    architectures = config.get("architectures") or ["ForCausalLM"]
    has_head = any(kind in name for name in architectures for kind in _PREDICTING)
    if (said and not said[0]) or not has_head:
        return None
    tables = {
        name.removesuffix(".weight"): shape
        for name, shape in reader.shapes.items()
        if name.endswith(".weight")
        and len(shape) == 2
        and not any(part.isdigit() for part in name.split("."))  # not of a layer
    }
    last = lambda name: name.rpartition(".")[2]
    heads = [name for name in tables if last(name) in _HEADS]
    others = [name for name in tables if name not in heads]
    named = [name for name in others if last(name) in _TABLES]
    embeddings = named or [name for name in others if tables[name][0] == rows]
    embeddings.sort(key=lambda name: tables[name][0] != rows)
    if not embeddings:
        return Tied("lm_head", "lm_head") if "lm_head" in tables else None
    embedding = embeddings[0]
    equal = [name for name in heads if reader.equal(f"{embedding}.weight", f"{name}.weight")]
    if heads and not equal:
        return None
    return Tied(embedding, equal[-1] if equal else "lm_head")
