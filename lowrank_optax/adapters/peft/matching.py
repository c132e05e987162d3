"""Which modules an adapter_config.json selects, and with which rank and alpha: PEFT's own rules.

A module is named by its dotted path in the PyTorch model, ``model.layers.0.self_attn.q_proj``.
"""

from collections.abc import Mapping
import re
from typing import TypeVar

from lowrank_optax.adapters.peft.config import Names, PeftConfig

T = TypeVar("T")


def is_target(name: str, config: PeftConfig) -> bool:
    """Whether the module is adapted.

    Example:
      >>> config = PeftConfig(target_modules=("q_proj",), layers_to_transform=1)
      >>> [is_target(f"model.layers.{i}.self_attn.q_proj", config) for i in range(3)]
      [False, True, False]
    """
    if config.exclude_modules and is_named(name, config.exclude_modules):
        return False
    saved = config.modules_to_save or ()
    if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in _tuple(saved)):
        return False
    targets = config.target_modules
    if not targets:
        return False
    if isinstance(targets, str) or name in targets:
        return is_named(name, targets)
    layers, pattern = config.layers_to_transform, config.layers_pattern
    return is_named(name, targets) and in_layers(name, layers, pattern)


def is_saved(name: str, modules_to_save: Names) -> bool:
    """Whether the module is one of ``modules_to_save``, or inside one."""
    return any(
        name.endswith(m) or re.match(rf"(^|.*\.){re.escape(m)}\.", name)
        for m in _tuple(modules_to_save)
    )


def rank_of(name: str, config: PeftConfig) -> int:
    """The rank of the module's adapter."""
    return _by_pattern(name, config.rank_pattern, config.r)


def alpha_of(name: str, config: PeftConfig) -> float:
    """The alpha of the module's adapter."""
    return _by_pattern(name, config.alpha_pattern, config.lora_alpha)


def scale_of(name: str, config: PeftConfig) -> float:
    """What the product of the module's factors is multiplied by."""
    return config.scale(rank_of(name, config), alpha_of(name, config))


def has_pattern(name: str, pattern: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` means the module."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def is_named(name: str, names: Names) -> bool:
    """Whether names mean a module: a regular expression of all of it, or names or their ends."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == n or name.endswith(f".{n}") for n in names or ())


def in_layers(name: str, layers: int | tuple[int, ...] | None, layers_pattern: Names) -> bool:
    """Whether the module is in one of ``layers_to_transform``, None or empty for all."""
    if layers is None or layers == ():
        return True
    match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    if layers_pattern:
        found = [re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in _tuple(layers_pattern)]
        match = next((m for m in found if m), None)
    if match is None:
        return False
    return int(match[1]) in ((layers,) if isinstance(layers, int) else layers)


def _by_pattern(name: str, patterns: Mapping[str, T], otherwise: T) -> T:
    """The value of the first pattern, in the file's order, that the name ends with."""
    found = (p for p in patterns if has_pattern(name, p))
    return next((patterns[p] for p in found), otherwise)
