"""Adam with its moments in codes: a reference, and kernels for TPUs and GPUs."""

from lowrank_optax.kernels.low_bit_adam.api import low_bit_adam

__all__ = ["low_bit_adam"]
