"""Layers and reparameterised weights that keep training small."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank_optax.layers.powerpropagation import (
    MaskUpdatesState,
    apply_masks,
    change_alpha,
    magnitude_masks,
    mask_updates,
    packnet,
    powerprop,
    powerprop_inverse,
    powerprop_updates,
)

if TYPE_CHECKING:
    from lowrank_optax.layers import linen
    from lowrank_optax.layers.powerpropagation.nnx import PowerpropLinear, PowerpropModule

# The Flax parts, NNX here and Linen in `linen`: Flax is imported when one is first used.
_FLAX = {
    "PowerpropLinear": "lowrank_optax.layers.powerpropagation.nnx",
    "PowerpropModule": "lowrank_optax.layers.powerpropagation.nnx",
}

__all__ = [
    # Powerpropagation
    "MaskUpdatesState",
    "PowerpropLinear",
    "PowerpropModule",
    "apply_masks",
    "change_alpha",
    "magnitude_masks",
    "mask_updates",
    "packnet",
    "powerprop",
    "powerprop_inverse",
    "powerprop_updates",
    # The layers in Linen
    "linen",
]


def __getattr__(name: str) -> Any:
    if name == "linen":
        return import_module("lowrank_optax.layers.linen")
    if name in _FLAX:
        return getattr(import_module(_FLAX[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
