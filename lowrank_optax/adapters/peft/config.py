"""adapter_config.json: what of it is supported or refused by name, and which modules it selects.

A module is named by its dotted path in the PyTorch model, ``model.layers.0.self_attn.q_proj``.
"""

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import json
from pathlib import Path
import re
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from lowrank_optax.adapters.base import Adapter
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
    Kind,
    choice,
    integer,
    list_of,
    mapping_to,
    wrong_fields,
)

if TYPE_CHECKING:
    from lowrank_optax.adapters.peft.tensors import Layout

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
_NAMES_OR_PATTERN = PATTERN | list_of(TEXT) | NULL
HARMLESS_OF_LORA = frozenset(
    {
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "qalora_group_size",
    }
)
# What to do with an adapter that is not supported.
MERGE_IN_PEFT = (
    "Merge it in PEFT (`merge_and_unload`), save the merged model, and load that instead."
)
# Those that leave the base as it was; the residual of "pissa" is computed again.
_INITIALS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "pissa")


class UnsupportedConfigError(ValueError):
    """An adapter_config.json that asks for something which is not done here."""


class Selection(NamedTuple):
    """A field that selects layers by names.

    Attributes:
      field: The field's name.
      names: The names in it.
      selects: Whether one of these names, the second argument, selects a module, the first.
      layers: Modules of which it has to select some.
    """

    field: str
    names: Iterable[str]
    selects: Callable[[str, str], bool]
    layers: Sequence[str]

    def is_there(self, name: str) -> bool:
        """Whether one of these names selects any of the layers."""
        return any(self.selects(module, name) for module in self.layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig(abc.ABC):
    """An adapter_config.json: the fields that every kind of adapter has.

    A kind is a subclass. Its fields are those of the file, with PEFT's defaults.

    Attributes:
      others: Every further field, as it was read: they are written again.
    """

    peft_type: ClassVar[str]
    field_kinds: ClassVar[Mapping[str, Kind]] = {
        "target_modules": _NAMES_OR_PATTERN,
        "exclude_modules": _NAMES_OR_PATTERN,
        "layers_to_transform": integer(0) | list_of(integer(0)) | NULL,
        "layers_pattern": PATTERN | list_of(PATTERN) | NULL,
        "modules_to_save": list_of(PATTERN) | NULL,
        "fan_in_fan_out": BOOLEAN,
        "ensure_weight_tying": BOOLEAN | NULL,
    }
    """What each field may be."""
    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            "auto_mapping",
            "base_model_name_or_path",
            "inference_mode",
            "peft_type",
            "peft_version",
            "revision",
            "runtime_config",
            "task_type",
            *_REFUSED,
        }
    )
    """Fields without effect on what the adapter computes, or refused unless they are off."""
    pattern_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that map patterns of modules to values."""

    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: Names = None
    modules_to_save: Names = None
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool | None = False
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def refused(cls, content: Mapping[str, Any]) -> list[str]:
        """Fields that change the function and are not supported, each with its value and why."""
        refused = _REFUSED.keys() - {f.name for f in dataclasses.fields(cls)}
        return [
            f"{k}={content[k]!r} ({why})"
            for k, why in _REFUSED.items()
            if k in refused and content.get(k)
        ]

    @classmethod
    def wrong(cls, content: Mapping[str, Any]) -> list[str]:
        """A sentence for each field whose value is impossible, alone or beside the others."""
        wrong = wrong_fields(content, cls.field_kinds)
        layers, pattern = (content.get(f"layers_{k}") for k in ("to_transform", "pattern"))
        if isinstance(content.get("target_modules"), str) and (layers not in (None, []) or pattern):
            wrong.append(
                "layers_to_transform and layers_pattern select layers of a list in target_modules, "
                f"which is the regular expression {content['target_modules']!r}"
            )
        if pattern and layers is None:
            wrong.append(f"layers_pattern={pattern!r} needs layers_to_transform, which is null")
        return wrong

    @abc.abstractmethod
    def layer_shapes(self, module: str, layout: "Layout") -> dict[str, tuple[int, ...]]:
        """Names (after the module's) and PyTorch's shapes of the tensors of a layer's adapter.

        Raises:
          ValueError: If the configuration is not possible or not supported for such a layer.
        """

    @property
    def needs_base(self) -> str:
        """The field, with its value, that has no meaning without the base model; or ""."""
        return ""

    def selections(self, layers: Sequence[str], targets: Sequence[str]) -> "Iterator[Selection]":
        """What selects layers beside ``target_modules``.

        Args:
          layers: All layers of the base.
          targets: Those that are adapted.
        """
        del layers
        for field in self.pattern_fields:
            yield Selection(field, getattr(self, field), has_pattern, targets)

    def shared_shapes(self, layouts: Iterable["Layout"]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that these layers share; there are none by default."""
        del layouts
        return {}

    def content(self) -> dict[str, Any]:
        """The fields of the file."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        others = fields.pop("others")
        return {"peft_type": self.peft_type, "inference_mode": True, **others, **fields}

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


class AttachedConfig(BaseConfig):
    """An adapter_config.json of a kind that is attached as a method of this library."""

    @property
    def is_pissa(self) -> bool:
        """Whether the base is changed when it is attached."""
        return False

    @property
    def may_skip_layers(self) -> bool:
        """Whether an adapter of scale zero can stand for layers of a stack that have none."""
        return True

    @abc.abstractmethod
    def method(self) -> Adapter:
        """The method that the file holds."""

    @abc.abstractmethod
    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""

    def scale_of(self, module: str) -> float:
        """The scale of a module's adapter."""
        del module
        return 1.0

    @abc.abstractmethod
    def arrays(self, layout: "Layout", tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays of the method for one layer, float32, by their names there."""

    def shared_arrays(
        self, layout: "Layout", tensors: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Arrays that layers of this layout share, as `arrays`; there are none by default."""
        del layout, tensors
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig(AttachedConfig):
    """An adapter_config.json of the LoRA family, with the fields it has there."""

    peft_type = "LORA"
    field_kinds: ClassVar = {
        **BaseConfig.field_kinds,
        "r": integer(1),
        "lora_alpha": NUMBER,
        "lora_dropout": FRACTION,
        "use_rslora": BOOLEAN,
        "use_dora": BOOLEAN,
        "rank_pattern": mapping_to(PATTERN, integer(1)) | NULL,
        "alpha_pattern": mapping_to(PATTERN, NUMBER) | NULL,
        "bias": choice("none", "all", "lora_only"),
        "target_parameters": list_of(TEXT) | NULL,
    }
    harmless = BaseConfig.harmless | HARMLESS_OF_LORA
    pattern_fields = ("rank_pattern", "alpha_pattern")

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bias: str = "none"
    target_parameters: tuple[str, ...] | None = None

    @classmethod
    def refused(cls, content: Mapping[str, Any]) -> list[str]:
        """Fields of variants of LoRA; values of init_lora_weights that belong to another base."""
        refused = super().refused(content)
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
        return refused

    def layer_shapes(self, module: str, layout: "Layout") -> dict[str, tuple[int, ...]]:
        """The factors and DoRA's magnitude; see `BaseConfig.layer_shapes`."""
        if self.use_dora and layout.kind in ("embedding", "experts"):
            what = "an embedding" if layout.kind == "embedding" else "experts"
            raise UnsupportedConfigError(
                f"use_dora=True of {what} ({module}): unsupported. {MERGE_IN_PEFT}"
            )
        if self.is_pissa and layout.kind != "linear":
            raise UnsupportedConfigError(
                f"init_lora_weights='pissa' of {module}, which is no linear layer: unsupported. "
                f"{MERGE_IN_PEFT}"
            )
        return layout.shapes(self.rank_of(module), self.use_dora)

    @property
    def is_pissa(self) -> bool:
        """See `AttachedConfig.is_pissa`."""
        return self.init_lora_weights == "pissa"

    @property
    def may_skip_layers(self) -> bool:
        """See `AttachedConfig.may_skip_layers`."""
        return not (self.use_dora or self.is_pissa)

    @property
    def needs_base(self) -> str:
        """PiSSA's; see `BaseConfig.needs_base`."""
        return "init_lora_weights='pissa'" if self.is_pissa else ""

    def arrays(self, layout: "Layout", tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `AttachedConfig.arrays`."""
        a, b = layout.unpack(tensors)
        arrays = {"A": a, "B": b}
        if self.use_dora:
            magnitude = tensors["lora_magnitude_vector"].astype(np.float32)
            arrays["magnitude"] = magnitude.reshape(-1)
        return arrays

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return by_pattern(module, self.rank_pattern, self.r)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module's adapter."""
        return by_pattern(module, self.alpha_pattern, self.lora_alpha)

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


def by_pattern(module: str, patterns: Mapping[str, T], default: T) -> T:
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
