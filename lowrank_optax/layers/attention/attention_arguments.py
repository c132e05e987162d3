"""What all implementations of attention have in common: checks, and the name of the output."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from lowrank_optax.matrices.explicit_sharding import merge_axes, split_axis

Window = int | tuple[int, int] | None

# What policies for rematerialization call the output of attention.
CONTEXT = "attention_context"


def check_arguments(
    query: Any, key: Any, value: Any, mask: Any, local_window_size: Window, scale: Any
) -> tuple[int, int] | None:
    """Raise ValueError unless shapes, dtypes, window and scale fit; the window as a pair.

    Its numbers are no larger than the lengths, since positions are int32.
    """
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            f"query and key must be [batch, length, heads, width], got shapes {query.shape} and "
            f"{key.shape}."
        )
    if key.shape != value.shape:
        raise ValueError(f"value must have the key's shape {key.shape}, got {value.shape}.")
    if query.shape[::3] != key.shape[::3]:
        raise ValueError(
            "query and key must have the same batch and width, got shapes "
            f"{query.shape} and {key.shape}."
        )
    if not key.shape[2] or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query has {query.shape[2]} heads, which must be a multiple of the key's "
            f"{key.shape[2]}."
        )
    if not (query.dtype == key.dtype == value.dtype and jnp.issubdtype(query.dtype, jnp.floating)):
        raise ValueError(
            "query, key and value must have one floating-point dtype, got "
            f"{query.dtype}, {key.dtype} and {value.dtype}."
        )
    if mask is not None:
        scores = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        fits = mask.ndim == 4 and all(m in (1, n) for m, n in zip(mask.shape, scores, strict=True))
        if not fits or mask.dtype != bool:
            raise ValueError(
                f"mask must be bool and broadcast to {scores}, got {mask.dtype} of shape "
                f"{mask.shape}."
            )
    if isinstance(scale, jax.core.Tracer):
        raise ValueError(
            f"scale={scale} must be a number when the program is compiled: multiply the query by "
            "it instead."
        )
    if local_window_size is None:
        return None
    is_pair = isinstance(local_window_size, tuple | list) and len(local_window_size) == 2
    before, after = local_window_size if is_pair else (local_window_size,) * 2
    for size in (before, after):
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 0:
            raise ValueError(
                f"local_window_size={local_window_size!r} must be an integer or a pair of "
                "integers, none of them negative."
            )
    return min(int(before), query.shape[1]), min(int(after), key.shape[1])


def name_context(output: jax.Array, axes: int) -> jax.Array:
    """Name the output for policies, with its last axes as one, as a TPU stores it without holes."""
    inner = output.shape[-axes + 1 :]
    flat = checkpoint_name(merge_axes(output, output.ndim - axes, axes), CONTEXT)
    return split_axis(flat, flat.ndim - 1, inner)
