"""Powerpropagation: weights as powers of trained parameters, and pruning by magnitude."""

__all__: list[str] = []  # its names are exported by the folder above
