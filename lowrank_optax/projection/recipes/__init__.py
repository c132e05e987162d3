"""The methods by name, each a recipe over `scale_by_projection` without numerics of its own."""

from lowrank_optax.projection.recipes.adarankgrad import adarankgrad
from lowrank_optax.projection.recipes.apollo import apollo, apollo_mini
from lowrank_optax.projection.recipes.dct_adamw import dct_adamw
from lowrank_optax.projection.recipes.fira import fira
from lowrank_optax.projection.recipes.galore import galore
from lowrank_optax.projection.recipes.ldadam import ldadam
from lowrank_optax.projection.recipes.online_subspace_descent import online_subspace_descent

__all__ = [
    "adarankgrad",
    "apollo",
    "apollo_mini",
    "dct_adamw",
    "fira",
    "galore",
    "ldadam",
    "online_subspace_descent",
]
