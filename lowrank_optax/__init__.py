"""Memory-efficient training for JAX, as optax transformations and Flax modules."""

from lowrank_optax import (
    activations,
    adapters,
    layers,
    losses,
    planning,
    schedules,
    sharding,
    training,
)
from lowrank_optax.matrices import WeightDimensionNumbers, weight_dimension_numbers
from lowrank_optax.modules import selection_table
from lowrank_optax.optimizers import (
    adagrad_norm,
    cautious_adamw,
    extrapolate,
    extrapolated_value_and_grad,
    extrapolation_eval_params,
    grams,
    mirror_sinkhorn,
    nag_gs,
    nag_gs_quadratic,
    optimal_transport,
    round_to_polytope,
    scale_by_adagrad_norm,
    scale_by_nag_gs,
    to_heavy_ball,
    with_gradient_direction,
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
from lowrank_optax.slices import apply_in_slices, in_slices
from lowrank_optax.states import (
    from_int8_weights,
    fused_adamw,
    in_float32,
    low_bit,
    round_updates,
    to_int8_weights,
    update_int8_weights,
)
from lowrank_optax.training import update_in_backward

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
    # Optimizers on full gradients
    "adagrad_norm",
    "cautious_adamw",
    "extrapolate",
    "extrapolated_value_and_grad",
    "extrapolation_eval_params",
    "grams",
    "nag_gs",
    "nag_gs_quadratic",
    "scale_by_adagrad_norm",
    "scale_by_nag_gs",
    "to_heavy_ball",
    "with_gradient_direction",
    # Couplings with given row and column sums
    "mirror_sinkhorn",
    "optimal_transport",
    "round_to_polytope",
    # Lower peaks: slice by slice, block by block
    "apply_in_slices",
    "in_slices",
    "update_in_backward",
    # Fewer bits
    "from_int8_weights",
    "fused_adamw",
    "in_float32",
    "low_bit",
    "round_updates",
    "to_int8_weights",
    "update_int8_weights",
    # Nonlinearities that keep a few bits
    "activations",
    # Memory of a step, before it runs
    "planning",
    # Adapters of frozen weights
    "adapters",
    # Layers and reparameterised weights
    "layers",
    # Losses without logits
    "losses",
    # From step to step
    "schedules",
    "training",
    # State on many devices
    "sharding",
]
