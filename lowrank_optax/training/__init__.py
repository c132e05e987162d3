"""What happens around the step: learning rates, batch sizes, weight decay, probes of the loss."""

from lowrank_optax.training.batch_size import AdaptiveBatchSize, BatchSizeState
from lowrank_optax.training.cycling import OneCycleSchedules, one_cycle, one_cycle_schedules
from lowrank_optax.training.decay_masks import decay_mask, parameter_kinds
from lowrank_optax.training.decay_monitor import MonitorWeightDecayState, monitor_weight_decay
from lowrank_optax.training.decay_report import Measurements, adam_elr, measurements
from lowrank_optax.training.gradient_noise import (
    GradientNoise,
    accumulate_with_noise,
    coordinate_wise_batch_size,
    per_example_gradients,
    per_example_noise,
)
from lowrank_optax.training.layered_models import LayeredFunctions
from lowrank_optax.training.probes import hessian_trace, jacobian_norm_sq, top_eigenvalue
from lowrank_optax.training.range_test import (
    RangeTestGrid,
    RangeTestResult,
    Suggestion,
    Suggestions,
    lr_range_test,
    refine_weight_decay,
)
from lowrank_optax.training.update_in_backward import UpdateInBackward, update_in_backward
from lowrank_optax.training.weight_decay import AddWeightDecayState, add_weight_decay
from lowrank_optax.training.weight_decay_equilibrium import Equilibrium, equilibrium

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
    "measurements",
    "monitor_weight_decay",
    "parameter_kinds",
    # The update inside the backward pass
    "LayeredFunctions",
    "UpdateInBackward",
    "update_in_backward",
    # Probes of the loss
    "hessian_trace",
    "jacobian_norm_sq",
    "top_eigenvalue",
]
