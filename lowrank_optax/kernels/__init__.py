"""Kernels for the hot loops, each with a plain jax.numpy reference, and the rule that chooses."""

from lowrank_optax.kernels.adam import AdamScalars
from lowrank_optax.kernels.dispatch import Implementation, ImplementationName
from lowrank_optax.kernels.low_bit_adam import low_bit_adam
from lowrank_optax.kernels.projected_adam import projected_adam

__all__ = ["AdamScalars", "Implementation", "ImplementationName", "low_bit_adam", "projected_adam"]
