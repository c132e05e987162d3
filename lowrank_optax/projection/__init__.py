"""Optimizers that work in a low-rank subspace of each gradient matrix."""

from lowrank_optax.projection import refresh, residuals, subspaces
from lowrank_optax.projection.compaction import compact
from lowrank_optax.projection.limiter import LimitNormGrowthState, limit_norm_growth
from lowrank_optax.projection.recipes.adarankgrad import adarankgrad
from lowrank_optax.projection.recipes.apollo import apollo, apollo_mini
from lowrank_optax.projection.recipes.dct_adamw import dct_adamw
from lowrank_optax.projection.recipes.fira import fira
from lowrank_optax.projection.recipes.galore import galore
from lowrank_optax.projection.recipes.ldadam import ldadam
from lowrank_optax.projection.recipes.online_subspace_descent import online_subspace_descent
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
