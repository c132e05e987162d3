"""Schedules of the learning rate and momentum, and the training aids that set them."""

from lowrank_optax.training import (
    AdaptiveBatchSize,
    OneCycleSchedules,
    lr_range_test,
    monitor_weight_decay,
    one_cycle,
    one_cycle_schedules,
)

__all__ = [
    "AdaptiveBatchSize",
    "OneCycleSchedules",
    "lr_range_test",
    "monitor_weight_decay",
    "one_cycle",
    "one_cycle_schedules",
]
