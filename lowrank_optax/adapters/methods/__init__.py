"""One file a method: which arrays it has, and what they add to a layer."""

__all__: list[str] = []  # its names are exported by the folder above
