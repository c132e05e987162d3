"""Attention with frozen random scores, and softmax attention by random features."""

__all__: list[str] = []  # its names are exported by the folder above
