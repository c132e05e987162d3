"""Rules that find the subspace a gradient is projected to, one file each."""

from lowrank_optax.projection.subspaces.adaptive_rank import AdaptiveBasis, adaptive_rank
from lowrank_optax.projection.subspaces.base import Subspace, from_basis
from lowrank_optax.projection.subspaces.both_sides import TwoBases, both_sides
from lowrank_optax.projection.subspaces.dct import dct
from lowrank_optax.projection.subspaces.fixed import fixed
from lowrank_optax.projection.subspaces.online_pca import TrackedBasis, online_pca
from lowrank_optax.projection.subspaces.power_iteration import power_iteration
from lowrank_optax.projection.subspaces.quantized import quantized
from lowrank_optax.projection.subspaces.random import random
from lowrank_optax.projection.subspaces.randomized_svd import randomized_svd
from lowrank_optax.projection.subspaces.svd import svd

__all__ = [
    "AdaptiveBasis",
    "Subspace",
    "TrackedBasis",
    "TwoBases",
    "adaptive_rank",
    "both_sides",
    "dct",
    "fixed",
    "from_basis",
    "online_pca",
    "power_iteration",
    "quantized",
    "random",
    "randomized_svd",
    "svd",
]
