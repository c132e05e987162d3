"""Nonlinearities whose backward pass keeps a few bits of each element."""

from lowrank_optax.activations.step_function import Codebook

__all__ = [
    # Derivatives in a few bits
    "Codebook",
]
