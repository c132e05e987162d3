"""Weight decay seen and steered: a monitor, masks by kind of parameter, couplings, probes."""

from lowrank_optax.schedules.weight_decay.coupling import AddWeightDecayState, add_weight_decay
from lowrank_optax.schedules.weight_decay.equilibrium import Equilibrium, equilibrium
from lowrank_optax.schedules.weight_decay.masks import decay_mask, parameter_kinds
from lowrank_optax.schedules.weight_decay.monitor import (
    MonitorWeightDecayState,
    monitor_weight_decay,
)
from lowrank_optax.schedules.weight_decay.plot import plot_weight_decay
from lowrank_optax.schedules.weight_decay.probes import (
    hessian_trace,
    jacobian_norm_sq,
    top_eigenvalue,
)
from lowrank_optax.schedules.weight_decay.report import Measurements, adam_elr, measurements

__all__ = [
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
