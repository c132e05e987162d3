"""Linear layers that save a sketch of their input for the backward pass."""
