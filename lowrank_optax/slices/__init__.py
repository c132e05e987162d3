"""Updates slice by slice, in place: what every optimizer of this library runs large leaves by."""

from lowrank_optax.slices.transformation import apply_in_slices, in_slices
from lowrank_optax.slices.whole import CannotCutError, Whole

__all__ = ["CannotCutError", "Whole", "apply_in_slices", "in_slices"]
