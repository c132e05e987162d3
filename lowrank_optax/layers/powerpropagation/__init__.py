"""Powerpropagation: weights as powers of what is trained, and pruning by magnitude."""

from lowrank_optax.layers.powerpropagation import packnet
from lowrank_optax.layers.powerpropagation.masked import MaskUpdatesState, mask_updates
from lowrank_optax.layers.powerpropagation.optimizer import powerprop_updates
from lowrank_optax.layers.powerpropagation.pruning import apply_masks, magnitude_masks
from lowrank_optax.layers.powerpropagation.reparameterisation import (
    change_alpha,
    powerprop,
    powerprop_inverse,
)

__all__ = [
    "MaskUpdatesState",
    "apply_masks",
    "change_alpha",
    "magnitude_masks",
    "mask_updates",
    "packnet",
    "powerprop",
    "powerprop_inverse",
    "powerprop_updates",
]
