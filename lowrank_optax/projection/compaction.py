"""Smaller arrays for a state whose ranks fell, made between steps."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.matrices.paths import normalised_path, owner_of, path_string
from lowrank_optax.projection.state import ScaleByProjectionState
from lowrank_optax.projection.subspaces import AdaptiveBasis
from lowrank_optax.states import LowBitState


def compact(state: Any, report: Callable[[str], Any] | None = None) -> Any:
    """Cuts what belongs to unused directions from the state; call it between steps.

    For optimizers whose rank is data (`adarankgrad`, or any with ``subspaces.adaptive_rank``): each
    basis, and each array of the inner state with the projected shape, is cut to the largest active
    rank of its leaf, rounded up to one of 1, 2, 3, 4, 6, 8, 12, 16, 24, … so that a jitted step is
    recompiled at most twice for each halving. The next updates are the same; ranks can not grow
    beyond that. (A square matrix of full rank is not cut if ``on_refresh="keep"``: its state does
    not tell which axis is the compressed one.)

    Args:
      state: Optax state of concrete arrays, with a `ScaleByProjectionState` somewhere in it.
      report: Function that gets a sentence with the bytes before and after, as ``print``.

    Returns:
      The smaller state, of the same structure.

    Raises:
      ValueError: If the state has no adaptive rank, or moments in 8 or 4 bits.
      jax.errors.ConcretizationTypeError: Under ``jit``, where shapes can not change.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.adarankgrad(0.01, rank=4)
      >>> gradient = {"kernel": jnp.eye(4, 6) * jnp.array([4.0, 1.0, 0.1, 0.1, 0.0, 0.0])}
      >>> _, state = tx.update(gradient, tx.init(gradient))
      >>> smaller = lro.compact(state, report=print)
      optimizer state: 288 -> 160 bytes (ranks: kernel 4 -> 2)
      >>> smaller[0].inner.mu["kernel"].shape
      (2, 6)

    Reference:
      Refael et al., AdaRankGrad, 2024, https://arxiv.org/abs/2410.17881, section 4, whose memory
      figures assume state of the current rank.
    """
    is_projection = lambda x: isinstance(x, ScaleByProjectionState)
    changes: dict[str, tuple[int, int]] = {}
    is_low_bit = lambda x: isinstance(x, LowBitState)
    if any(map(is_low_bit, jax.tree.leaves(state, is_leaf=is_low_bit))):
        raise ValueError(
            "compact cannot cut moments that are stored in codes (low_bit, or state_bits=): their "
            "blocks and scales would no longer fit."
        )
    found = [s for s in jax.tree.leaves(state, is_leaf=is_projection) if is_projection(s)]
    if not any(isinstance(s.basis, AdaptiveBasis) for s in found):
        raise ValueError(
            "state holds no rank that could have fallen: compact is for adarankgrad and other "
            "optimizers with subspaces.adaptive_rank."
        )
    shrink = lambda x: _compacted(x, changes) if is_projection(x) else x
    smaller = jax.tree.map(shrink, state, is_leaf=is_projection)
    if report is not None:
        ranks = ", ".join(f"{path} {old} -> {new}" for path, (old, new) in changes.items())
        sizes = f"{_bytes(state):,} -> {_bytes(smaller):,} bytes"
        report(f"optimizer state: {sizes} (ranks: {ranks or 'as they were'})")
    return smaller


def rounded_rank(rank: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is not below ``rank``."""
    power = 1 << max(rank - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and rank <= power * 3 // 4 else power


def _compacted(
    state: ScaleByProjectionState, changes: dict[str, tuple[int, int]]
) -> ScaleByProjectionState:
    if not isinstance(state.basis, AdaptiveBasis):
        return state
    ranks = {  # by path: batch axes, allocated rank, new rank
        normalised_path(path): (basis.ndim - 2, basis.shape[-1], _needed(basis, rank))
        for (path, basis), rank in zip(
            jax.tree_util.tree_leaves_with_path(state.basis.basis),
            jax.tree.leaves(state.basis.rank),
            strict=True,
        )
    }
    shrinkable = (state.inner, state.accumulated)
    for path, x in jax.tree_util.tree_leaves_with_path(shrinkable):
        owner = owner_of(path, ranks)
        if owner is not None and _axis(x, *ranks[owner]) is None:
            ranks[owner] = (*ranks[owner][:2], ranks[owner][1])  # not cut
    for path, _ in jax.tree_util.tree_leaves_with_path(state.basis.basis):
        _, old, new = ranks[normalised_path(path)]
        if new < old:
            changes[path_string(path)] = (old, new)

    def cut(path: Any, x: jax.Array) -> jax.Array:
        owner = owner_of(path, ranks)
        if owner is None or ranks[owner][1] == ranks[owner][2]:
            return x
        axis = _axis(x, *ranks[owner])
        return x if not axis else jax.lax.slice_in_dim(x, 0, ranks[owner][2], axis=x.ndim + axis)

    shrink = lambda tree: jax.tree_util.tree_map_with_path(cut, tree)
    basis = jax.tree_util.tree_map_with_path(
        lambda path, x: x[..., : ranks[normalised_path(path)][2]], state.basis.basis
    )
    return state._replace(
        basis=state.basis._replace(basis=basis),
        inner=shrink(state.inner),
        accumulated=shrink(state.accumulated),
    )


def _needed(basis: jax.Array, rank: jax.Array) -> int:
    """The size for the largest active rank of the leaf; all of it before the first refresh."""
    largest = int(np.max(jax.device_get(rank), initial=0))
    return min(rounded_rank(largest), basis.shape[-1]) if largest else basis.shape[-1]


def _axis(x: jax.Array, batch_ndim: int, old: int, new: int) -> int | None:
    """The axis of the projected size, counted from the end; 0 if there is none, None if unknown.

    If both axes have that size, for a square matrix of full rank, it is the one whose unused part
    is zero, as that of rotated and reset moments is.
    """
    axes = [axis for axis in range(-x.ndim + batch_ndim, 0) if x.shape[axis] == old]
    if len(axes) < 2 or new == old:
        return axes[0] if axes else 0
    tail = lambda axis: jax.lax.slice_in_dim(x, new, None, axis=x.ndim + axis)
    empty = [axis for axis in axes if not jnp.any(tail(axis))]
    return empty[0] if len(empty) == 1 or (empty and not jnp.any(x)) else None


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
