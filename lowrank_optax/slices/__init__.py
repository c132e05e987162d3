"""Updates slice by slice, in place: how every optimizer of this library runs large leaves."""

from lowrank_optax.slices.call import CannotCutError, Whole
from lowrank_optax.slices.update import apply_in_slices, in_slices

__all__ = ["CannotCutError", "Whole", "apply_in_slices", "in_slices"]
