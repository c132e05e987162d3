"""The layers in Flax Linen."""

from lowrank_optax.layers.powerpropagation.linen import PowerpropDense, PowerpropModule

__all__ = ["PowerpropDense", "PowerpropModule"]
