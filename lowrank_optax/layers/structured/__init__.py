"""Linear layers whose weight is the product of two factors with fewer parameters."""

__all__: list[str] = []  # its names are exported by the folder above
