"""The decoder configurations that have a name."""

from collections.abc import Mapping
import dataclasses
import os
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lowrank_optax.models.config import DecoderConfig

# llama-60m to -7b: Zhao et al. 2024, GaLore (https://arxiv.org/abs/2403.03507), appendix, with
# the details of the configuration files in https://github.com/jiaweizzhao/GaLore.
#                 hidden  intermediate  layers  heads  positions
_SIZES = {
    "llama-tiny": (128, 344, 4, 4, 1024),
    "llama-60m": (512, 1376, 8, 8, 1024),
    "llama-130m": (768, 2048, 12, 12, 1024),
    "llama-350m": (1024, 2736, 24, 16, 1024),
    "llama-1b": (2048, 5461, 24, 32, 1024),
    "llama-7b": (4096, 11008, 32, 32, 2048),
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        name: MappingProxyType(
            {
                "vocab_size": 32000,
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "max_position_embeddings": positions,
            }
        )
        for name, (hidden, intermediate, layers, heads, positions) in _SIZES.items()
    }
)


def decoder_config(name_or_path: str | os.PathLike, **overrides: Any) -> DecoderConfig:
    """The configuration with this name, or the one in a Hugging Face config.json.

    Args:
        name_or_path: `llama-tiny` (for tests and examples), `llama-60m`, `llama-130m`,
            `llama-350m`, `llama-1b`, `llama-7b` (the GaLore paper's models), or the path of a
            config.json or of a folder holding one.
        **overrides: fields of `DecoderConfig` that take another value.

    Returns:
        The configuration.

    Raises:
        ValueError: no such name or path, an override that is no field, or a value that makes no
            decoder.

    Example:
        >>> config = decoder_config("llama-tiny", vocab_size=257)
        >>> config.hidden_size, config.vocab_size
        (128, 257)

    References:
        Zhao et al. 2024, GaLore: https://arxiv.org/abs/2403.03507
    """
    fields = [field.name for field in dataclasses.fields(DecoderConfig)]
    unknown = [name for name in overrides if name not in fields]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: no field of a decoder's configuration; "
            f"the fields are {', '.join(fields)}"
        )
    if name_or_path in PRESETS:
        preset: dict[str, Any] = dict(PRESETS[name_or_path])
        return DecoderConfig(**(preset | overrides))
    if not Path(name_or_path).exists():
        raise ValueError(
            f"{os.fspath(name_or_path)!r} is neither a named configuration "
            f"({', '.join(PRESETS)}) nor a config.json or a folder holding one"
        )
    return DecoderConfig.from_huggingface(name_or_path, **overrides)
