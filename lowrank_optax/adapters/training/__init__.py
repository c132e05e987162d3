"""Training of adapters: freezing, ranks by layer, learning rates and phases."""

__all__: list[str] = []  # its names are exported by the folder above
