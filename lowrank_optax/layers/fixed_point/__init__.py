"""Layers whose tensors are fixed-point numbers with a trained binary point."""

__all__: list[str] = []  # its names are exported by the folder above
