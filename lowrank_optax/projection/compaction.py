"""Memory of ranks that fell, given back: smaller arrays for the same state, made between steps."""

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
    """The state with what belongs to unused directions cut away; call it between steps.

    For optimizers whose rank is data (`adarankgrad`, or any with ``subspaces.adaptive_rank``): each
    basis, and each array of the inner state in its projected shape, is cut to the largest active
    rank of its leaf, rounded up to one of 1, 2, 3, 4, 6, 8, 12, 16, 24, … so that a jitted step is
    recompiled at most twice for each halving. The next updates are the same; ranks can not grow
    beyond what is left. (A square matrix of full rank whose moments were kept at refreshes is left
    as it is: its state does not tell which axis is the compressed one.)

    Args:
      state: Any optax state with a `ScaleByProjectionState` somewhere in it, of concrete arrays.
      report: Called with a sentence that gives the bytes before and after, as ``print``.

    Returns:
      The smaller state, of the same structure.

    Raises:
      ValueError: If there is no rank in the state that could have fallen, or moments are in 8 or 4
        bits.
      jax.errors.ConcretizationTypeError: Under ``jit``: shapes can not change there.

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
    ranks = {  # by path: batch axes, rank that is allocated, rank that is to be
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
            ranks[owner] = (*ranks[owner][:2], ranks[owner][1])  # left as it is
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

    Where both axes have that size, for a square matrix of full rank, the one whose unused part is
    zero, as rotated and reset moments are; moments that were kept do not tell.
    """
    axes = [axis for axis in range(-x.ndim + batch_ndim, 0) if x.shape[axis] == old]
    if len(axes) < 2 or new == old:
        return axes[0] if axes else 0
    empty = [axis for axis in axes if not jnp.any(_tail(x, axis, new))]
    return empty[0] if len(empty) == 1 or (empty and not jnp.any(x)) else None


def _tail(x: jax.Array, axis: int, start: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, start, None, axis=x.ndim + axis)


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
