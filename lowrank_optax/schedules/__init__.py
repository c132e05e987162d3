"""What changes from step to step: learning rates and momenta, batch sizes, weight decay."""

from lowrank_optax.schedules.batch_size import AdaptiveBatchSize, BatchSizeState
from lowrank_optax.schedules.cycle_schedules import OneCycleSchedules, one_cycle_schedules
from lowrank_optax.schedules.cycled_optimizer import one_cycle
from lowrank_optax.schedules.gradient_noise import GradientNoise, accumulate_with_noise
from lowrank_optax.schedules.per_example import (
    coordinate_wise_batch_size,
    per_example_gradients,
    per_example_noise,
)
from lowrank_optax.schedules.range_plot import plot_lr_range_test
from lowrank_optax.schedules.range_reading import Suggestion, Suggestions, refine_weight_decay
from lowrank_optax.schedules.range_test import RangeTestGrid, RangeTestResult, lr_range_test
from lowrank_optax.schedules.weight_decay import (
    AddWeightDecayState,
    Equilibrium,
    Measurements,
    MonitorWeightDecayState,
    adam_elr,
    add_weight_decay,
    decay_mask,
    equilibrium,
    hessian_trace,
    jacobian_norm_sq,
    measurements,
    monitor_weight_decay,
    parameter_kinds,
    plot_weight_decay,
    top_eigenvalue,
)

__all__ = [
    # Learning rate and momentum
    "OneCycleSchedules",
    "RangeTestGrid",
    "RangeTestResult",
    "Suggestion",
    "Suggestions",
    "lr_range_test",
    "one_cycle",
    "one_cycle_schedules",
    "plot_lr_range_test",
    "refine_weight_decay",
    # Batch sizes
    "AdaptiveBatchSize",
    "BatchSizeState",
    "GradientNoise",
    "accumulate_with_noise",
    "coordinate_wise_batch_size",
    "per_example_gradients",
    "per_example_noise",
    # Weight decay
    "AddWeightDecayState",
    "Equilibrium",
    "Measurements",
    "MonitorWeightDecayState",
    "adam_elr",
    "add_weight_decay",
    "decay_mask",
    "equilibrium",
    "hessian_trace",
    "jacobian_norm_sq",
    "measurements",
    "monitor_weight_decay",
    "parameter_kinds",
    "plot_weight_decay",
    "top_eigenvalue",
]
