"""Reading an adapter_config.json as the configuration of its kind."""

from collections.abc import Mapping
import dataclasses
from typing import Any
import warnings

from lowrank_optax.adapters.peft.config import (
    CONFIG_FILE,
    MERGE_IN_PEFT,
    BaseConfig,
    PeftConfig,
    UnsupportedConfigError,
)
from lowrank_optax.adapters.peft.kinds import FOLDED_KINDS

_KINDS = {kind.peft_type: kind for kind in (PeftConfig, *FOLDED_KINDS)}


def parse_config(content: Mapping[str, Any], source: str = CONFIG_FILE) -> BaseConfig:
    """The configuration in an object of adapter_config.json, which is from a file of that name.

    Raises:
      UnsupportedConfigError: If a field that changes what the adapter computes has a value that is
        not supported: each by name, with its value.
      ValueError: If a field has a value that it cannot have.
    """
    peft_type = content.get("peft_type")
    if peft_type is None:
        raise UnsupportedConfigError(f"{source} has no peft_type, so no known meaning.")
    kind = _KINDS.get(str(peft_type).upper())
    if kind is None:
        raise UnsupportedConfigError(
            f"{source}: peft_type={peft_type!r} is not supported, only {', '.join(_KINDS)} are. "
            f"{MERGE_IN_PEFT}"
        )
    if refused := kind.refused(content):
        raise UnsupportedConfigError(
            f"{source} has {'; '.join(refused)}: unsupported. {MERGE_IN_PEFT}"
        )
    if wrong := kind.wrong(content):
        raise ValueError(f"{source} is damaged: {'; '.join(wrong)}.")
    own = {f.name for f in dataclasses.fields(kind)} - {"others"}
    unknown = content.keys() - own - kind.harmless
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
    for name in kind.pattern_fields:
        given[name] = given.get(name) or {}
    return kind(**given, others={k: v for k, v in content.items() if k not in own})
