"""Adam in a fixed subspace: a reference, and a kernel for TPUs."""

from lowrank_optax.kernels.projected_adam.api import projected_adam

__all__ = ["projected_adam"]
