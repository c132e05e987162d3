"""Powerpropagation: weights as powers of trained parameters, and pruning by magnitude."""

from lowrank_optax.layers.powerpropagation import packnet
from lowrank_optax.layers.powerpropagation.optimizer import powerprop_updates
from lowrank_optax.layers.powerpropagation.pruning import (
    MaskUpdatesState,
    apply_masks,
    magnitude_masks,
    mask_updates,
)
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
