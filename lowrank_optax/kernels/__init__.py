"""Adam with its moments in codes, as kernels and a jax.numpy reference; the rule that chooses."""

from lowrank_optax.kernels.adam import AdamScalars
from lowrank_optax.kernels.dispatch import Implementation, ImplementationName
from lowrank_optax.kernels.low_bit_adam_reference import low_bit_adam

__all__ = ["AdamScalars", "Implementation", "ImplementationName", "low_bit_adam"]
