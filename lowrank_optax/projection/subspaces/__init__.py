"""Rules that find the subspace a gradient is projected to, one file each."""

from lowrank_optax.projection.subspaces.base import Subspace
from lowrank_optax.projection.subspaces.randomized_svd import randomized_svd
from lowrank_optax.projection.subspaces.svd import svd

__all__ = ["Subspace", "randomized_svd", "svd"]
