"""Linear layers that keep a sketch of their input for the backward pass."""

from lowrank_optax.layers.randomized_linear.sketch import Sketch

__all__ = ["Sketch"]
