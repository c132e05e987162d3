"""adapter_config.json: what of it this library understands, and what it refuses by name."""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any
import warnings

from lowrank_optax.storage.fields import (
    BOOLEAN,
    FRACTION,
    NULL,
    NUMBER,
    PATTERN,
    TEXT,
    choice,
    integer,
    list_of,
    mapping_to,
    wrong_fields,
)

CONFIG_FILE = "adapter_config.json"

Names = str | tuple[str, ...] | None

# What changes the function and is not done here. Each is refused unless it is off.
_REFUSED = {
    "alora_invocation_tokens": "adapters that switch on at a token",
    "arrow_config": "routing among adapters",
    "kasa_config": "KaSA, whose base is changed",
    "layer_replication": "layers that stand in the model several times",
    "lora_bias": "a bias beside lora_B",
    "monteclora_config": "random samples of adapters",
    "target_parameters": "parameters without a module of their own (stacks of experts)",
    "trainable_token_indices": "rows of an embedding",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "QALoRA, whose inputs are pooled",
    "velora_config": "VeLoRA, whose backward pass is another",
}
# Understood by others, and of no effect on what the adapter computes.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_NAMES_OR_PATTERN = PATTERN | list_of(TEXT) | NULL
_KINDS = {
    "r": integer(1),
    "lora_alpha": NUMBER,
    "lora_dropout": FRACTION,
    "use_rslora": BOOLEAN,
    "use_dora": BOOLEAN,
    "target_modules": _NAMES_OR_PATTERN,
    "exclude_modules": _NAMES_OR_PATTERN,
    "layers_to_transform": integer(0) | list_of(integer(0)) | NULL,
    "layers_pattern": PATTERN | list_of(PATTERN) | NULL,
    "rank_pattern": mapping_to(PATTERN, integer(1)) | NULL,
    "alpha_pattern": mapping_to(PATTERN, NUMBER) | NULL,
    "modules_to_save": list_of(PATTERN) | NULL,
    "bias": choice("none", "all", "lora_only"),
    "fan_in_fan_out": BOOLEAN,
    "ensure_weight_tying": BOOLEAN | NULL,
}
# What to do with an adapter that is not supported.
MERGE_IN_PEFT = (
    "Merge it in PEFT (`merge_and_unload`), save the merged model, and load that instead."
)
# Those after which the base is what it was; of "pissa" the residual is computed again.
_INITIALS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "pissa")


class UnsupportedConfigError(ValueError):
    """An adapter_config.json that asks for something which is not done here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """An adapter_config.json of the LoRA family, fields as there.

    Attributes:
      others: Every further field, as it was read: they are written again.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str | None = True
    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: Names = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: Names = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool | None = False
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def scale(self, rank: int, alpha: float) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` of rsLoRA."""
        return alpha / (rank**0.5 if self.use_rslora else rank)

    def to_json(self) -> str:
        """The text of the file: sorted keys, two spaces."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        others = fields.pop("others")
        fixed = {"peft_type": "LORA", "inference_mode": True}
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return json.dumps(fixed | dict(others) | lists, indent=2, sort_keys=True) + "\n"


def read_json(folder: Path) -> dict[str, Any]:
    """The object in a folder's adapter_config.json.

    Raises:
      FileNotFoundError: If there is none; sub-folders that have one are listed.
      ValueError: If it is no JSON object.
    """
    file = folder / CONFIG_FILE
    if not file.exists():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_FILE}"))
        more = f"; its folders {', '.join(inside)} do" if inside else ""
        if (folder / "config.json").exists() and not more:
            more = ": it is a model's folder, not an adapter's"
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}{more}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object.")
    return content


def parse_config(content: Mapping[str, Any], source: str = CONFIG_FILE) -> PeftConfig:
    """The configuration in an object of adapter_config.json.

    Args:
      content: The object.
      source: Where it is from, for messages.

    Raises:
      UnsupportedConfigError: If a field that changes what the adapter computes has a value that is
        not supported: each by name, with its value.
      ValueError: If a field has a value that it cannot have.

    Warns:
      UserWarning: If there are fields that are not known here and not off.
    """
    _check_type(content, source)
    refused = [f"{k}={content[k]!r} ({why})" for k, why in _REFUSED.items() if content.get(k)]
    initial = content.get("init_lora_weights", True)
    if initial not in _INITIALS:
        refused.append(f"init_lora_weights={initial!r} ({_about_initial(initial)})")
    if initial == "pissa" and content.get("use_dora"):
        refused.append("use_dora=True with init_lora_weights='pissa' (DoRA of a residual)")
    if refused:
        raise UnsupportedConfigError(
            f"{source} has {'; '.join(refused)}: unsupported. {MERGE_IN_PEFT}"
        )
    wrong = wrong_fields(content, _KINDS) + _wrong_together(content)
    if wrong:
        raise ValueError(f"{source} is damaged: {'; '.join(wrong)}.")
    own = {f.name for f in dataclasses.fields(PeftConfig)} - {"others"}
    unknown = content.keys() - own - _REFUSED.keys() - _HARMLESS
    noticed = sorted(f"{k}={content[k]!r}" for k in unknown if content[k] or content[k] == 0)
    if noticed:
        warnings.warn(
            f"{source} has fields that are not known here: {', '.join(noticed)}. "
            "They are ignored, as PEFT does with those it does not know.",
            stacklevel=3,
        )
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in content.items() if k in own
    }
    for name in ("rank_pattern", "alpha_pattern"):
        given[name] = given.get(name) or {}
    return PeftConfig(**given, others={k: v for k, v in content.items() if k not in own})


def _wrong_together(content: Mapping[str, Any]) -> list[str]:
    """Fields that PEFT refuses beside others."""
    layers, pattern = (content.get(f"layers_{k}") for k in ("to_transform", "pattern"))
    wrong = []
    if isinstance(content.get("target_modules"), str) and (layers not in (None, []) or pattern):
        wrong.append(
            "layers_to_transform and layers_pattern select layers of a list in target_modules, "
            f"which is the regular expression {content['target_modules']!r}"
        )
    if pattern and layers is None:
        wrong.append(f"layers_pattern={pattern!r} needs layers_to_transform, which is null")
    return wrong


def _check_type(content: Mapping[str, Any], source: str) -> None:
    kind = content.get("peft_type")
    if kind is None:
        raise UnsupportedConfigError(f"{source} has no peft_type, so no known meaning.")
    if str(kind).upper() == "BONE":
        raise UnsupportedConfigError(
            f"{source}: peft_type='BONE' is an old name, PEFT calls it MISS now: rename BONE to "
            "MISS, and `.bone_` in the tensors' names to `.miss_`, as `lowrank-optax convert` "
            "does. Neither is supported here yet."
        )
    if str(kind).upper() != "LORA":
        raise UnsupportedConfigError(
            f"{source}: peft_type={kind!r} is not supported, only 'LORA' is. {MERGE_IN_PEFT}"
        )


def _about_initial(initial: Any) -> str:
    if isinstance(initial, str) and initial.startswith("pissa_niter"):
        return "its residual base is random: have PEFT convert it into a plain LoRA as it saves"
    if initial in ("olora", "loftq", "corda", "lora_ga"):
        return "it belongs to a base that it changed: have PEFT convert it as it saves"
    return "unknown"
