"""Positions of the cells of a grid, such as the patches of an image."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp


def grid_positions(
    shape: Sequence[int],
    *,
    class_token: bool = False,
    key: jax.Array | None = None,
    perturbation: float | Sequence[float] = 1.0,
) -> jax.Array:
    """Return the centres of a grid's cells, scaled to 0 to 1 on each axis.

    Because the whole grid is always 0 to 1, another resolution has other positions in the same
    range.

    Args:
      shape: Number of cells on each axis; ``(rows, columns)`` of patches for an image.
      class_token: Whether a token at 0.5 on each axis comes first.
      key: PRNG key; the cells' positions, but not the class token's, are then moved at random
        within their cell, as the paper does in training. For a batch use ``jax.vmap`` over keys.
      perturbation: Twice the standard deviation of these moves, in cells, before they are clipped
        to half a cell; one number, or one per axis, such as 0 for the frames of a video. Not used
        without a key.

    Returns:
      Positions ``[n, len(shape)]``, float32, the last axis of the grid fastest.

    Raises:
      ValueError: If the grid has no axis, an axis has no cell, or the perturbation is negative or
        does not fit the axes.

    Example:
      >>> import lowrank_optax as lro
      >>> print(lro.layers.comrope.grid_positions((1, 2), class_token=True))
      [[0.5  0.5 ]
       [0.5  0.25]
       [0.5  0.75]]

    Reference:
      Yu et al., 2025, https://arxiv.org/abs/2506.03737.
    """
    shape = tuple(shape)
    if not shape or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"shape must have a positive number of cells per axis, got {shape}.")
    stds = perturbation if isinstance(perturbation, Sequence) else [perturbation] * len(shape)
    if len(stds) != len(shape) or any(not math.isfinite(s) or s < 0 for s in stds):
        raise ValueError(
            f"perturbation={perturbation!r} must be a number of at least 0, or one for each of "
            f"{len(shape)} axes."
        )
    counts = jnp.asarray(shape, jnp.float32)
    indices = jnp.stack(jnp.meshgrid(*map(jnp.arange, shape), indexing="ij"), axis=-1)
    cells = indices.reshape(-1, len(shape)).astype(jnp.float32)
    if key is not None:
        moves = jnp.asarray(stds, jnp.float32) / 2 * jax.random.normal(key, cells.shape)
        cells = cells + jnp.clip(moves, -0.5, 0.5)
    positions = (cells + 0.5) / counts
    if class_token:
        positions = jnp.concatenate([jnp.full((1, len(shape)), 0.5), positions])
    return positions
