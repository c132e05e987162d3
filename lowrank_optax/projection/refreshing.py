"""The refresh: finds bases that need one again, and moves inner states to the new bases.

Each leaf has a conditional of its own, and so has each slice of one that is updated in slices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.matrices.branching import branch
from lowrank_optax.projection import transfer
from lowrank_optax.projection.leaf import LeafState, Parts, Prepared
from lowrank_optax.projection.subspaces import Subspace
from lowrank_optax.projection.subspaces.base import all_finite, select
from lowrank_optax.projection.view import View


class When(NamedTuple):
    """The step at which bases are looked at.

    Attributes:
      count: Number of optimizer steps before this one.
      may_refresh: Whether bases may turn now: True, or a traced bool while gradients accumulate.
      key: Key of this step.
    """

    count: jax.Array
    may_refresh: Any
    key: jax.Array


def refreshed(parts: Parts, leaves: Sequence[Prepared], when: When) -> list[tuple[LeafState, Any]]:
    """The states of the leaves, and their own inner states, after the refresh of those due."""
    able = [leaf.matrix is not None for leaf in leaves]
    if parts.subspace.shared and not all(able):
        able = [False] * len(leaves)  # one that arrived projected belongs to the basis so far
    if not parts.subspace.turns and parts.on_refresh == "keep":
        able = [False] * len(leaves)
    return [
        _refreshed(parts, leaf, when) if turn else (leaf.state, leaf.inner)
        for leaf, turn in zip(leaves, able, strict=True)
    ]


def _refreshed(parts: Parts, leaf: Prepared, when: When) -> tuple[LeafState, Any]:
    due = (when.count >= leaf.state.next_refresh) & when.may_refresh
    hold = lambda: (leaf.state, leaf.inner)
    if parts.subspace.shared:
        refresh = lambda: _refresh(parts, leaf, when, due)
        # A new seed is cheaper than a branch.
        return refresh() if parts.on_refresh == "keep" else branch(due, refresh, hold)
    usable = lambda: due & _usable(leaf.matrix)
    if parts.refresh.always and when.may_refresh is True:
        return _refresh(parts, leaf, when, usable())

    def refresh_usable() -> tuple[LeafState, Any]:
        # Two branches: the gradient is read only where one is due, and what is due may be useless
        # for long, as the zero gradient of a frozen layer.
        able = usable()
        return branch(jnp.any(able), lambda: _refresh(parts, leaf, when, able), hold)

    return branch(jnp.any(due), refresh_usable, hold)


def refreshed_without_leaves(
    parts: Parts, basis: Any, next_refresh: jax.Array, when: When
) -> LeafState:
    """What is shared by all leaves after the refresh, where there is no leaf that has it."""
    due = (when.count >= next_refresh) & when.may_refresh
    new = parts.subspace.refresh(when.key, None, basis, None, None)
    following, _ = parts.refresh.schedule((), when.count, next_refresh, None)
    following = jnp.where(due, following, next_refresh).astype(next_refresh.dtype)
    return LeafState(select(due, new, basis), following, (), ())


def _usable(matrix: Any) -> jax.Array:
    """Which gradients of a batch are finite and not zero."""
    return all_finite(matrix, matrix.ndim - 2) & jnp.any(matrix != 0, axis=(-2, -1))


def _refresh(parts: Parts, leaf: Prepared, when: When, due: jax.Array) -> tuple[LeafState, Any]:
    basis = leaf.state.basis
    if parts.subspace.shared:
        new = parts.subspace.refresh(when.key, None, basis, None, None)
    else:
        momentum = _momentum(parts, leaf, when)
        new = parts.subspace.refresh(when.key, leaf.matrix, basis, momentum, leaf.view)
    return _taken(parts, leaf, new, when, due)


def _momentum(parts: Parts, leaf: Prepared, when: When) -> jax.Array | None:
    if not parts.subspace.follow_momentum:
        return None
    return transfer.corrected_first_moment(leaf.inner, leaf.view, parts.averages, when.count)


def _taken(
    parts: Parts, leaf: Prepared, new: Any, when: When, due: jax.Array
) -> tuple[LeafState, Any]:
    """The leaf's states with the new basis, for those of the batch where it is any good."""
    state, inner, view, subspace = leaf.state, leaf.inner, leaf.view, parts.subspace
    taken = due & all_finite(new, len(view.batch)) if not subspace.shared else due
    basis = select(taken, new, state.basis)
    overlap = _overlap(subspace, state.basis, basis, view) if parts.refresh.compares else None
    following, statistics = parts.refresh.schedule(
        state.statistics, when.count, state.next_refresh, overlap
    )
    if parts.on_refresh != "keep":
        moved = transfer.transferred(
            parts.on_refresh,
            parts.inner,
            inner,
            subspace,
            state.basis,
            basis,
            view,
            parts.averages,
        )
        inner = select(jnp.broadcast_to(taken, view.batch), moved, inner)
    new_state = LeafState(
        basis,
        jnp.where(taken, following, state.next_refresh).astype(state.next_refresh.dtype),
        select(taken, statistics, state.statistics),
        state.residual,
    )
    return new_state, inner


def _overlap(subspace: Subspace, old: Any, new: Any, view: View) -> jax.Array:
    """Mean squared cosine ``[*batch]`` of the principal angles between two bases."""
    eye = jnp.broadcast_to(jnp.eye(view.rank, dtype=view.dtype), (*view.batch, *[view.rank] * 2))
    between = subspace.turn(old, new, eye, view._replace(partition=view.small_partition))
    return jnp.sum(jnp.square(between), axis=(-2, -1)) / view.rank
