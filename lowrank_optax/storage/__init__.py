"""Folders of tensors on disk: checked before they are read, replaced only when complete."""

__all__: list[str] = []  # its names are used by the files above it, or exported there
