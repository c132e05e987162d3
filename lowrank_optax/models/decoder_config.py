"""The shape of a Llama-family decoder, under the field names of Hugging Face's config.json."""

from collections.abc import Mapping
import dataclasses
import os
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, cast

from lowrank_optax.models.huggingface_config import (
    ARCHITECTURES,
    OPTIONS,
    config_file,
    fields_from_huggingface,
    fields_to_huggingface,
    is_option,
    read_json,
)
from lowrank_optax.models.rotary import RopeScaling, rope_scaling_from
from lowrank_optax.storage.fields import (
    BOOLEAN,
    NULL,
    POSITIVE_INTEGER,
    POSITIVE_NUMBER,
    integer,
    list_of,
    wrong_fields,
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; the fields are named as in Hugging Face's config.json.

    Hashable, so it can be a static argument of a jitted function.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads; None means `num_attention_heads`.
        head_dim: width of one head; None means `hidden_size // num_attention_heads`.
        rms_norm_eps: added to the mean square inside every RMS norm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: a `RopeScaling`, a dict of its fields, or None.
        tie_word_embeddings: whether the output head is the embedding itself.
        attention_bias: biases on query, key, value and output (llama and qwen3; qwen2 always has
            them on query, key and value, mistral has none).
        mlp_bias: biases in the MLP (llama only).
        sliding_window: a position sees itself and the `sliding_window - 1` before it; None means
            all before it (mistral, qwen2 and qwen3 only).
        hidden_act: the gate's activation; only `"silu"`.
        max_position_embeddings: the length trained for; a record, not enforced.
        model_type: `"llama"`, `"mistral"`, `"qwen2"` or `"qwen3"`.
        initializer_range: standard deviation of the initial weights.
        bos_token_id: first token of a text, or None; carried along, not used.
        eos_token_id: last token of a text (or several), or None; carried along, not used.

    Raises:
        ValueError: a field has a value that makes no decoder; the message names it.

    Example:
        >>> config = DecoderConfig(vocab_size=257, hidden_size=64, intermediate_size=172,
        ...                        num_hidden_layers=2, num_attention_heads=4)
        >>> config.head_dim, config.num_key_value_heads
        (16, 4)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    # None is resolved at construction, so whoever reads the two finds integers.
    num_key_value_heads: int = cast(int, None)
    head_dim: int = cast(int, None)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    model_type: str = "llama"
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_kinds(self)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}; choose another pair or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", rope_scaling_from(self.rope_scaling))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        _check_numbers(self)

    @property
    def query_key_value_bias(self) -> bool:
        """Whether the query, key and value projections have a bias."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def query_key_norm(self) -> bool:
        """Whether every query and key head is RMS-normalised before the rotation."""
        return self.model_type == "qwen3"

    @classmethod
    def from_huggingface(
        cls, source: Mapping[str, Any] | str | os.PathLike, **overrides: Any
    ) -> Self:
        """Reads a Hugging Face configuration; both the layouts of transformers 4 and 5.

        Args:
            source: the parsed config.json, its path, or the folder that holds it.
            **overrides: fields that take another value than the one read.

        Returns:
            The configuration; fields that have no meaning here are left out.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is not a JSON object, names another `model_type`, lacks a size, has a
                field of a wrong type or value, or asks for something this decoder does not do.

        Example:
            >>> sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=16,
            ...              num_hidden_layers=1, num_attention_heads=2)
            >>> config = DecoderConfig.from_huggingface({"model_type": "qwen2", **sizes,
            ...     "num_key_value_heads": 1, "rope_parameters": {"rope_theta": 1e6}})
            >>> config.rope_theta, config.query_key_value_bias
            (1000000.0, True)
        """
        content = source if isinstance(source, Mapping) else read_json(source)
        try:
            fields = fields_from_huggingface(content, dataclasses.fields(cls), KINDS)
            return cls(**(fields | overrides))
        except ValueError as error:
            if isinstance(source, Mapping):
                raise
            raise ValueError(f"{config_file(source)}: {error}") from error

    def to_huggingface(self) -> dict[str, Any]:
        """The configuration as the dict of a config.json, which transformers 4 and 5 both read.

        Example:
            >>> config = DecoderConfig(vocab_size=257, hidden_size=64, intermediate_size=172,
            ...                        num_hidden_layers=2, num_attention_heads=4)
            >>> DecoderConfig.from_huggingface(config.to_huggingface()) == config
            True
        """
        fields = dataclasses.asdict(self)
        if self.rope_scaling is not None:
            fields["rope_scaling"] = self.rope_scaling.to_huggingface()
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        return fields_to_huggingface(fields)


KINDS = {
    "vocab_size": POSITIVE_INTEGER,
    "hidden_size": POSITIVE_INTEGER,
    "intermediate_size": POSITIVE_INTEGER,
    "num_hidden_layers": POSITIVE_INTEGER,
    "num_attention_heads": POSITIVE_INTEGER,
    "num_key_value_heads": POSITIVE_INTEGER | NULL,
    "head_dim": POSITIVE_INTEGER | NULL,
    "rms_norm_eps": POSITIVE_NUMBER,
    "rope_theta": POSITIVE_NUMBER,
    "tie_word_embeddings": BOOLEAN,
    "attention_bias": BOOLEAN,
    "mlp_bias": BOOLEAN,
    "sliding_window": POSITIVE_INTEGER | NULL,
    "max_position_embeddings": POSITIVE_INTEGER,
    "initializer_range": POSITIVE_NUMBER,
    "bos_token_id": integer(0) | NULL,
    "eos_token_id": integer(0) | list_of(integer(0)) | NULL,
}
"""Kinds of the fields of a `DecoderConfig` with numbers and booleans."""


def _check_kinds(config: DecoderConfig) -> None:
    """Every field is of the right kind and sign."""
    if wrong := wrong_fields(vars(config), KINDS):
        raise ValueError("; ".join(wrong))
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported; "
            f"choose one of {', '.join(ARCHITECTURES)}"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act must be 'silu', got {config.hidden_act!r}")


def _check_numbers(config: DecoderConfig) -> None:
    """The fields fit each other."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} is not divisible by "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {config.head_dim}")
    for name, types in OPTIONS.items():
        if getattr(config, name) and not is_option(name, config.model_type):
            raise ValueError(
                f"{name} is not an option of model_type {config.model_type!r}, but of "
                f"{' and '.join(map(repr, types))}"
            )


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
        ValueError: an unknown name or path, an override that is not a field, or a value out of
            range.

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
