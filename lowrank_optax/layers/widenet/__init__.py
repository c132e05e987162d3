"""WideNet: one shared block with norms for each layer, and a mixture of experts in it."""

__all__: list[str] = []  # its names are exported by the folder above
