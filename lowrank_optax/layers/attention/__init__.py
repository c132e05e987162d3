"""Attention without the matrix of all scores, and one function for all its implementations."""

__all__: list[str] = []  # its names are exported by the folder above
