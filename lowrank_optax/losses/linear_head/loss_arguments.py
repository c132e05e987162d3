"""What `linear_cross_entropy` refuses."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.matrices.explicit_sharding import partition_of
from lowrank_optax.storage.fields import is_number

REDUCTIONS = ("mean", "sum", "none")


def check_options(
    label_smoothing: float, z_loss: float, soft_cap: float | None, reduction: str
) -> None:
    """Raises ValueError if an option of the loss is out of its range."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction={reduction!r} must be one of {', '.join(map(repr, REDUCTIONS))}."
        )
    if not (is_number(label_smoothing) and 0 <= label_smoothing <= 1):
        raise ValueError(f"label_smoothing={label_smoothing!r} must be a number from 0 to 1.")
    if not (is_number(z_loss) and z_loss >= 0 and math.isfinite(z_loss)):
        raise ValueError(f"z_loss={z_loss!r} must be a finite number, not negative.")
    if soft_cap is not None and not (is_number(soft_cap) and 0 < soft_cap < math.inf):
        raise ValueError(f"soft_cap={soft_cap!r} must be a positive number, or None for no cap.")


def check_head(hidden: Any, head: Any, head_axis: int) -> None:
    """Raises ValueError if the head is no matrix with the hidden states' features on this axis."""
    if head_axis not in (0, 1):
        raise ValueError(f"head_axis={head_axis!r} must be 0 for [D, V] or 1 for [V, D].")
    if len(head.shape) != 2 or head.shape[head_axis] != hidden.shape[-1]:
        raise ValueError(
            f"head {head.shape} must have {hidden.shape[-1]} features, as hidden {hidden.shape}, "
            f"on its axis head_axis={head_axis}."
        )


def check_integers(**options: Any) -> None:
    """Raises ValueError if one of these options is neither an integer nor None."""
    for name, x in options.items():
        if isinstance(x, bool) or not isinstance(x, int | np.integer | None):
            raise ValueError(f"{name}={x!r} must be an integer or None.")


def check_shapes(
    hidden: Any, head: Any, labels: Any, bias: Any, lora: Any, weights: Any, head_axis: int
) -> None:
    """Raises TypeError or ValueError if the arrays don't fit together."""
    a, b = (None, None) if lora is None else lora[:2]
    named = {"hidden": hidden, "head": head, "bias": bias, "A of lora": a, "B of lora": b}
    for name, x in named.items():
        if x is not None and not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(f"{name} must be floating point, got {jnp.result_type(x)}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}.")
    if hidden.ndim == 0 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {labels.shape} must have the shape of hidden {hidden.shape} without its last "
            "axis."
        )
    check_head(hidden, head, head_axis)
    words = head.shape[1 - head_axis]
    if bias is not None and jnp.shape(bias) != (words,):
        raise ValueError(f"bias {jnp.shape(bias)} must be {(words,)}, for head {head.shape}.")
    if lora is not None:
        a, b = jnp.shape(lora[0]), jnp.shape(lora[1])
        if len(lora) != 3 or len(a) != 2 or a[0] != hidden.shape[-1] or b != (a[1], words):
            raise ValueError(
                f"lora must be A [{hidden.shape[-1]}, r], B [r, {words}] and a scale, got A {a} "
                f"and B {b}."
            )
    for name, x in (("hidden", hidden), ("head", head)):
        if any(partition_of(x) or ()):
            raise ValueError(
                f"{name} is sharded over explicit mesh axes, {partition_of(x)}: call "
                "linear_cross_entropy inside jax.shard_map over these axes."
            )
    if weights is not None and jnp.shape(weights) != labels.shape:
        raise ValueError(f"weights {jnp.shape(weights)} must have the labels' shape {labels.shape}")


def check_sharded(argument: str, axis_name: Any, **arrays: Any) -> None:
    """Raises ValueError if none of these arrays is sharded over the mesh axis named for them.

    Each device would count the same words or tokens again. With ``check_vma=False``, and outside of
    `jax.shard_map`, arrays do not say over which axes they vary, nor does the device's index.
    """
    if axis_name is None:
        return
    axes = lambda x: jax.typeof(x).manual_axis_type.varying
    varying = frozenset().union(*map(axes, arrays.values()))
    if missing := axes(jax.lax.axis_index(axis_name)) - varying:
        raise ValueError(
            f"{argument}={axis_name!r}: {' and '.join(arrays)} must be sharded over "
            f"{', '.join(map(repr, sorted(missing)))}, and every device has the same: name the "
            f"axis in the in_specs of jax.shard_map, or leave {argument} out."
        )


def check_labels(labels: Any, ignore_label: int | None, valid: int) -> None:
    """Raises ValueError if a label of a token that counts is known, and is out of range."""
    if isinstance(labels, jax.core.Tracer) or not getattr(labels, "is_fully_addressable", True):
        return
    known = np.asarray(labels)
    wrong = (known < 0) | (known >= valid)
    if ignore_label is not None:
        wrong &= known != ignore_label
    if wrong.any():
        raise ValueError(
            f"label {known[wrong][0]} is out of range: labels must be from 0 to {valid - 1}."
        )
