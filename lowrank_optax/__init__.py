"""Memory-efficient training for JAX, as optax transformations and Flax modules."""

from lowrank_optax.matrices import (
    WeightDimensionNumbers,
    selection_table,
    weight_dimension_numbers,
)
from lowrank_optax.projection import galore, scale_by_projection, subspaces

__version__ = "0.1.0"

__all__ = [
    # Which leaves are matrices, and how
    "WeightDimensionNumbers",
    "selection_table",
    "weight_dimension_numbers",
    # Projected optimizers
    "galore",
    "scale_by_projection",
    "subspaces",
]
