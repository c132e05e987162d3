"""Rules that find the subspace a gradient is projected to."""

from lowrank_optax.projection.subspaces.base import Subspace, from_basis
from lowrank_optax.projection.subspaces.dct import dct
from lowrank_optax.projection.subspaces.following import TrackedBasis, online_pca, power_iteration
from lowrank_optax.projection.subspaces.singular_vectors import randomized_svd, svd
from lowrank_optax.projection.subspaces.without_gradient import fixed, random
from lowrank_optax.projection.subspaces.wrappers import (
    AdaptiveBasis,
    TwoBases,
    adaptive_rank,
    both_sides,
    quantized,
)

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
