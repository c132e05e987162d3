"""Optimizers that work in a low-rank subspace of each gradient matrix."""

from lowrank_optax.projection import subspaces
from lowrank_optax.projection.recipes import galore
from lowrank_optax.projection.subspaces import Subspace
from lowrank_optax.projection.transform import ScaleByProjectionState, scale_by_projection

__all__ = [
    "ScaleByProjectionState",
    "Subspace",
    "galore",
    "scale_by_projection",
    "subspaces",
]
