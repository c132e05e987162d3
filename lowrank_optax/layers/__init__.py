"""Layers and reparameterised weights that keep training small."""

__all__: list[str] = []
