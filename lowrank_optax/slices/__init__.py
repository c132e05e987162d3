"""Updates slice by slice, in place: what every optimizer of this library runs large leaves by."""

from lowrank_optax.slices.call import Call
from lowrank_optax.slices.loop import Cut, run
from lowrank_optax.slices.plan import cut_of
from lowrank_optax.slices.transformation import apply_in_slices, in_slices
from lowrank_optax.slices.update import update_in_slices
from lowrank_optax.slices.whole import CannotCutError, Whole, key_of_leaf, key_of_slice, places_in

__all__ = [
    "Call",
    "CannotCutError",
    "Cut",
    "Whole",
    "apply_in_slices",
    "cut_of",
    "in_slices",
    "key_of_leaf",
    "key_of_slice",
    "places_in",
    "run",
    "update_in_slices",
]
