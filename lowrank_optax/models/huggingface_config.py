"""What Hugging Face (transformers 4 and 5) calls a decoder's fields and modules."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from lowrank_optax.models.rotary import rope_scaling_from
from lowrank_optax.storage.fields import (
    BOOLEAN,
    NULL,
    OBJECT,
    POSITIVE_INTEGER,
    POSITIVE_NUMBER,
    TEXT,
    Kind,
    integer,
    list_of,
    wrong_fields,
)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Fields of some types alone; qwen2 always has biases in its attention, mistral never.
OPTIONS = {
    "attention_bias": ("llama", "qwen3"),
    "mlp_bias": ("llama",),
    "sliding_window": ("mistral", "qwen2", "qwen3"),
}

# Modules of the decoder.
OUTER_MODULES = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
BLOCK_MODULES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}

# The same by path, `{}` for the number of a layer: what `adapters.save_peft` reads.
MODULE_NAMES = OUTER_MODULES | {
    f"blocks/{{}}/{ours.replace('.', '/')}": f"model.layers.{{}}.{theirs}"
    for ours, theirs in BLOCK_MODULES.items()
}

# What Hugging Face assumes where a config.json leaves a field out, if it is not our own default.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}

# Fields that are read and do not become fields of their own.
_KINDS = {
    "max_sequence_length": POSITIVE_INTEGER,
    "max_window_layers": integer(0),
    "use_sliding_window": BOOLEAN,
    "layer_types": list_of(TEXT) | NULL,
    "rope_parameters": OBJECT | NULL,
    "rope_scaling": OBJECT | NULL,
    "rope_theta": POSITIVE_NUMBER | NULL,
}


def config_file(source: str | os.PathLike) -> Path:
    """The path of a config.json, from its own or its folder's."""
    path = Path(source)
    return path / "config.json" if path.is_dir() else path


def read_json(source: str | os.PathLike) -> Mapping[str, Any]:
    """The object in a config.json.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a JSON object.
    """
    path = config_file(source)
    if not path.is_file():
        adapter = (path.parent / "adapter_config.json").exists()
        hint = ": an adapter is there. Load its base model, then the adapter by `load_peft`"
        raise FileNotFoundError(f"there is no config.json at {path}{hint if adapter else ''}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def fields_from_huggingface(
    source: Mapping[str, Any], wanted: Sequence[dataclasses.Field], kinds: Mapping[str, Kind]
) -> dict[str, Any]:
    """The fields that a parsed config.json gives, defaults of its type filled in.

    Args:
        source: the parsed config.json.
        wanted: the fields.
        kinds: kinds of fields by name.

    Raises:
        ValueError: a field is missing, of another kind, or asks for something that is not done.
    """
    model_type = source.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; "
            f"the configuration must name one of {', '.join(ARCHITECTURES)}"
        )
    if wrong := wrong_fields(source, {**kinds, **_KINDS}):
        raise ValueError("; ".join(wrong))
    # max_sequence_length: the name in the configuration files of the GaLore repository.
    length = source.get("max_sequence_length", 2048)
    defaults = {"max_position_embeddings": length} | _DEFAULTS[model_type]
    source = defaults | dict(source)
    fields = {field.name: source[field.name] for field in wanted if field.name in source}
    required = [field.name for field in wanted if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in fields]:
        raise ValueError(f"the configuration lacks {', '.join(missing)}")
    # Hugging Face's models of other types do not read them either.
    fields = {name: x for name, x in fields.items() if is_option(name, model_type)}
    return fields | _rope_fields(source) | {"sliding_window": _sliding_window(source, model_type)}


def fields_to_huggingface(fields: dict[str, Any]) -> dict[str, Any]:
    """The config.json for the fields of a `DecoderConfig`, given as a dict of plain values."""
    model_type, window = fields["model_type"], fields["sliding_window"]
    fields = {name: x for name, x in fields.items() if is_option(name, model_type)}
    fields["architectures"] = [ARCHITECTURES[model_type]]
    if model_type in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = window is not None
        fields["max_window_layers"] = fields["num_hidden_layers"] if window is None else 0
    return fields


def is_option(name: str, model_type: str) -> bool:
    """Whether a field has an effect on this type of model."""
    return model_type in OPTIONS.get(name, ARCHITECTURES)


def _sliding_window(source: Mapping[str, Any], model_type: str) -> int | None:
    """One window for all layers, or None; a mixture of layers is refused."""
    window = source.get("sliding_window", 4096)  # Hugging Face's default, but for llama
    if model_type == "llama" or window is None:
        return None
    if model_type == "mistral":
        return window
    if not source.get("use_sliding_window", False):
        return None
    layers = source["num_hidden_layers"]
    full = source.get("max_window_layers", 28)
    by_layer = source.get("layer_types")
    if by_layer is None:
        by_layer = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if len(by_layer) != layers:
        raise ValueError(
            f"layer_types must have num_hidden_layers={layers} entries, got {len(by_layer)}"
        )
    kinds = set(by_layer)
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"}:
        return window
    raise ValueError(
        f"the configuration mixes layers of the kinds {', '.join(sorted(kinds))}; "
        "this decoder has the same attention in all layers"
    )


def _rope_fields(source: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which transformers 5 has inside `rope_parameters`."""
    name = "rope_parameters" if source.get("rope_parameters") else "rope_scaling"
    parameters = source.get(name) or {}
    without_type = {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    if not {"rope_type", "type"} & parameters.keys() and parameters.keys() - without_type:
        raise ValueError(f"{name} must have a rope_type, got {dict(parameters)}")
    rotated = parameters.get("partial_rotary_factor", source.get("partial_rotary_factor"))
    if rotated not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor must be 1, got {rotated!r}")
    theta = parameters.get("rope_theta", source.get("rope_theta"))
    length = source["max_position_embeddings"]
    return {
        "rope_theta": 10000.0 if theta is None else theta,
        "rope_scaling": rope_scaling_from(
            {"original_max_position_embeddings": length} | dict(parameters)
        ),
    }
