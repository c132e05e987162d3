"""Memory-efficient training for JAX, as optax transformations and Flax modules."""

from lowrank_optax.matrices import WeightDimensionNumbers
from lowrank_optax.projection import galore, scale_by_projection, subspaces

__version__ = "0.1.0"

__all__ = [
    "WeightDimensionNumbers",
    "galore",
    "scale_by_projection",
    "subspaces",
]
