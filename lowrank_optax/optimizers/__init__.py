"""Optimizers that work on full gradients, and rules for any optimizer."""

__all__: list[str] = []
