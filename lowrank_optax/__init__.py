"""Memory-efficient training for JAX, as optax transformations and Flax modules."""

from lowrank_optax import sharding
from lowrank_optax.matrices import (
    WeightDimensionNumbers,
    selection_table,
    weight_dimension_numbers,
)
from lowrank_optax.projection import (
    View,
    adarankgrad,
    apollo,
    apollo_mini,
    compact,
    dct_adamw,
    fira,
    galore,
    ldadam,
    limit_norm_growth,
    online_subspace_descent,
    refresh,
    residuals,
    scale_by_projection,
    subspaces,
)
from lowrank_optax.states import (
    from_int8_weights,
    fused_adamw,
    in_float32,
    low_bit,
    round_updates,
    to_int8_weights,
    update_int8_weights,
)

__version__ = "0.1.0"

__all__ = [
    # Which leaves are matrices, and how
    "WeightDimensionNumbers",
    "selection_table",
    "weight_dimension_numbers",
    # Projected optimizers
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
    # Fewer bits
    "from_int8_weights",
    "fused_adamw",
    "in_float32",
    "low_bit",
    "round_updates",
    "to_int8_weights",
    "update_int8_weights",
    # State on many devices
    "sharding",
]
