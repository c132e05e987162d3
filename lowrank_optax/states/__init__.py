"""Optimizer state and parameters in fewer bits."""

from lowrank_optax.states.fused import FusedOptimizer, fused_adamw
from lowrank_optax.states.int8_weights import (
    Int8Weight,
    Int8WeightsState,
    from_int8_weights,
    to_int8_weights,
    update_int8_weights,
)
from lowrank_optax.states.low_bit import LowBitState, low_bit
from lowrank_optax.states.precision import in_float32
from lowrank_optax.states.rounding import RoundUpdatesState, round_updates, stochastic_round

__all__ = [
    "FusedOptimizer",
    "Int8Weight",
    "Int8WeightsState",
    "LowBitState",
    "RoundUpdatesState",
    "from_int8_weights",
    "fused_adamw",
    "in_float32",
    "low_bit",
    "round_updates",
    "stochastic_round",
    "to_int8_weights",
    "update_int8_weights",
]
