"""The layers in Flax Linen."""

from lowrank_optax.layers.powerpropagation.linen import PowerpropDense, PowerpropModule
from lowrank_optax.layers.randomized.linen import RandomizedDense

__all__ = ["PowerpropDense", "PowerpropModule", "RandomizedDense"]
