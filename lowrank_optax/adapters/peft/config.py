"""adapter_config.json: what of it is supported or refused by name, and which modules it selects.

A module is named by its dotted path in the PyTorch model, ``model.layers.0.self_attn.q_proj``.
"""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
import re
from typing import Any, TypeVar
import warnings

from lowrank_optax.adapters.methods.dora import DoRA
from lowrank_optax.adapters.methods.lora import LoRA
from lowrank_optax.adapters.methods.pissa import PiSSA
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
T = TypeVar("T")

# Fields that change the function and are not supported. Each is refused unless it is off.
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
# Fields without effect on what the adapter computes.
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
# Those that leave the base as it was; the residual of "pissa" is computed again.
_INITIALS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "pissa")


class UnsupportedConfigError(ValueError):
    """An adapter_config.json that asks for something which is not done here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """An adapter_config.json of the LoRA family, with the fields it has there.

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

    @property
    def is_pissa(self) -> bool:
        return self.init_lora_weights == "pissa"

    def content(self) -> dict[str, Any]:
        """The fields of the file."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        others = fields.pop("others")
        return {"peft_type": "LORA", "inference_mode": True, **others, **fields}

    def is_target(self, module: str) -> bool:
        """Whether a module is adapted, by PEFT's rules.

        Example:
          >>> config = PeftConfig(target_modules=("q_proj",), layers_to_transform=1)
          >>> [config.is_target(f"model.layers.{i}.self_attn.q_proj") for i in range(3)]
          [False, True, False]
        """
        targets = self.target_modules
        if not targets or (self.exclude_modules and is_named(module, self.exclude_modules)):
            return False
        if any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in as_tuple(self.modules_to_save)):
            return False
        layers = self.layers_to_transform
        if isinstance(targets, str) or module in targets or layers is None or layers == ():
            return is_named(module, targets)
        return is_named(module, targets) and self.layer_of(module) in as_tuple(layers)

    def layer_of(self, module: str) -> int | None:
        """The number that ``layers_to_transform`` means; None for a module outside of layers."""
        if self.layers_pattern:
            patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in as_tuple(self.layers_pattern)]
        else:
            patterns = [r".*?\.[^.]*\.(\d+)\."]
        found = (re.match(pattern, module) for pattern in patterns)
        return next((int(match[1]) for match in found if match), None)

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return _by_pattern(module, self.rank_pattern, self.r)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module's adapter."""
        return _by_pattern(module, self.alpha_pattern, self.lora_alpha)

    def scale_of(self, module: str) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` of rsLoRA."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (rank**0.5 if self.use_rslora else rank)

    def method(self, module: str | None = None) -> LoRA | PiSSA:
        """The method that the file holds, with its general rank and alpha or those of a module."""
        options: dict[str, Any] = {
            "rank": self.r if module is None else self.rank_of(module),
            "alpha": self.lora_alpha if module is None else self.alpha_of(module),
            "rank_stabilized": self.use_rslora,
        }
        if self.is_pissa:
            return PiSSA(**options)
        return (DoRA if self.use_dora else LoRA)(dropout=self.lora_dropout, **options)


def as_tuple(value: T | tuple[T, ...] | None) -> tuple[T, ...]:
    """The values of a field that may hold one value, several or null."""
    return value if isinstance(value, tuple) else () if value is None else (value,)


def is_named(module: str, names: Names) -> bool:
    """Whether names mean a module: a regular expression of all of it, or names or their ends."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == n or module.endswith(f".{n}") for n in names or ())


def is_saved(module: str, modules_to_save: Names) -> bool:
    """Whether a module is one of ``modules_to_save``, or inside one."""
    return any(
        module.endswith(m) or re.match(rf"(^|.*\.){re.escape(m)}\.", module)
        for m in as_tuple(modules_to_save)
    )


def has_pattern(module: str, pattern: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` means a module."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _by_pattern(module: str, patterns: Mapping[str, T], default: T) -> T:
    """The value of the first pattern, in the file's order, that the name ends with."""
    return next((patterns[p] for p in patterns if has_pattern(module, p)), default)


def read_json(folder: Path) -> dict[str, Any]:
    """The object in a folder's adapter_config.json."""
    file = folder / CONFIG_FILE
    if not file.exists():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_FILE}"))
        more = f"; its folders {', '.join(inside)} do" if inside else ""
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}{more}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object.")
    return content


def parse_config(content: Mapping[str, Any], source: str = CONFIG_FILE) -> PeftConfig:
    """The configuration in an object of adapter_config.json, which is from a file of that name.

    Raises:
      UnsupportedConfigError: If a field that changes what the adapter computes has a value that is
        not supported: each by name, with its value.
      ValueError: If a field has a value that it cannot have.
    """
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
    refused = [f"{k}={content[k]!r} ({why})" for k, why in _REFUSED.items() if content.get(k)]
    initial = content.get("init_lora_weights", True)
    if initial not in _INITIALS:
        about = "unknown"
        if initial in ("olora", "loftq", "corda", "lora_ga"):
            about = "it belongs to a base that it changed: have PEFT convert it as it saves"
        elif str(initial).startswith("pissa_niter"):
            about = "its residual is random: have PEFT convert it into a plain LoRA as it saves"
        refused.append(f"init_lora_weights={initial!r} ({about})")
    if initial == "pissa" and content.get("use_dora"):
        refused.append("use_dora=True with init_lora_weights='pissa' (DoRA of a residual)")
    if refused:
        raise UnsupportedConfigError(
            f"{source} has {'; '.join(refused)}: unsupported. {MERGE_IN_PEFT}"
        )
    wrong = wrong_fields(content, _KINDS)
    layers, pattern = (content.get(f"layers_{k}") for k in ("to_transform", "pattern"))
    if isinstance(content.get("target_modules"), str) and (layers not in (None, []) or pattern):
        wrong.append(
            "layers_to_transform and layers_pattern select layers of a list in target_modules, "
            f"which is the regular expression {content['target_modules']!r}"
        )
    if pattern and layers is None:
        wrong.append(f"layers_pattern={pattern!r} needs layers_to_transform, which is null")
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
