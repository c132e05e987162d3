"""Optimizers that work in a low-rank subspace of each gradient matrix."""

from lowrank_optax.projection import refresh, residuals, subspaces
from lowrank_optax.projection.compaction import compact
from lowrank_optax.projection.limiter import LimitNormGrowthState, limit_norm_growth
from lowrank_optax.projection.recipes import (
    adarankgrad,
    apollo,
    apollo_mini,
    dct_adamw,
    fira,
    galore,
    ldadam,
    online_subspace_descent,
)
from lowrank_optax.projection.refresh import RefreshRule
from lowrank_optax.projection.residuals import Residual
from lowrank_optax.projection.state import ScaleByProjectionState
from lowrank_optax.projection.subspaces import Subspace
from lowrank_optax.projection.transform import scale_by_projection
from lowrank_optax.projection.view import View

__all__ = [
    "LimitNormGrowthState",
    "RefreshRule",
    "Residual",
    "ScaleByProjectionState",
    "Subspace",
    "View",
    "adarankgrad",
    "apollo",
    "apollo_mini",
    "compact",
    "dct_adamw",
    "fira",
    "galore",
    "ldadam",
    "limit_norm_growth",
    "online_subspace_descent",
    "refresh",
    "residuals",
    "scale_by_projection",
    "subspaces",
]
