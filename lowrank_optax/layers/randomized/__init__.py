"""Linear layers that save a sketch of their input for the backward pass."""

from lowrank_optax.layers.randomized.linear import randomized_linear
from lowrank_optax.layers.randomized.sketch import Sketch
from lowrank_optax.layers.randomized.variances import (
    alignment,
    choose_sketch_size,
    minibatch_variance,
    sketch_variance,
)

__all__ = [
    "Sketch",
    "alignment",
    "choose_sketch_size",
    "minibatch_variance",
    "randomized_linear",
    "sketch_variance",
]
