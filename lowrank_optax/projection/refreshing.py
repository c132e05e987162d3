"""The refresh: bases found anew where they are due, and inner states moved along.

What is due at the same steps is refreshed under one ``lax.cond`` in lockstep; leaves with steps of
their own under one each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.projection import transfer
from lowrank_optax.projection.leaf import LeafState, Parts, Prepared
from lowrank_optax.projection.subspaces import Subspace
from lowrank_optax.projection.subspaces.base import all_finite, select
from lowrank_optax.projection.subspaces.lockstep import in_lockstep
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
    results = [(leaf.state, leaf.inner) for leaf in leaves]
    if not parts.subspace.turns and parts.on_refresh == "keep":
        return results
    able = [i for i, x in enumerate(leaves) if x.matrix is not None]
    if parts.subspace.shared and len(able) < len(leaves):
        able = []  # gradients that arrived projected belong to the basis that is shared so far
    groups = [able] if parts.refresh.together else [[i] for i in able]
    for group in filter(None, groups):
        new = _refreshed_together(parts, [leaves[i] for i in group], when)
        results = [new[group.index(i)] if i in group else old for i, old in enumerate(results)]
    return results


def _refreshed_together(
    parts: Parts, leaves: Sequence[Prepared], when: When
) -> list[tuple[LeafState, Any]]:
    due = [(when.count >= x.state.next_refresh) & when.may_refresh for x in leaves]
    hold = lambda: [(x.state, x.inner) for x in leaves]
    if parts.subspace.shared:
        refresh = lambda: _refresh(parts, leaves, when, due)
        # A new seed is cheaper than a branch.
        return refresh() if parts.on_refresh == "keep" else _if_any(due, refresh, hold)
    usable = lambda: [d & _usable(x.matrix) for d, x in zip(due, leaves, strict=True)]
    if parts.refresh.always and when.may_refresh is True:
        return _refresh(parts, leaves, when, usable())

    def refresh_usable() -> list[tuple[LeafState, Any]]:
        # Two branches: gradients are read only where one is due, and what is due may be useless
        # for long, as the zero gradient of a frozen layer.
        able = usable()
        return _if_any(able, lambda: _refresh(parts, leaves, when, able), hold)

    return _if_any(due, refresh_usable, hold)


def _if_any(flags: Sequence[jax.Array], then: Any, otherwise: Any) -> Any:
    return jax.lax.cond(jnp.any(jnp.stack([jnp.any(x) for x in flags])), then, otherwise)


def _usable(matrix: Any) -> jax.Array:
    """Which gradients of a batch are finite and not zero."""
    return all_finite(matrix, matrix.ndim - 2) & jnp.any(matrix != 0, axis=(-2, -1))


def _refresh(
    parts: Parts, leaves: Sequence[Prepared], when: When, due: Sequence[jax.Array]
) -> list[tuple[LeafState, Any]]:
    shared = parts.subspace.shared
    steps = [
        parts.subspace.steps(when.key, None, x.state.basis, None, None)
        if shared
        else parts.subspace.steps(when.key, x.matrix, x.state.basis, _momentum(parts, x), x.view)
        for x in leaves
    ]
    return [
        _taken(parts, x, new, when, taken)
        for x, new, taken in zip(leaves, in_lockstep(steps), due, strict=True)
    ]


def _momentum(parts: Parts, leaf: Prepared) -> jax.Array | None:
    if not parts.subspace.follow_momentum:
        return None
    return transfer.corrected_first_moment(parts.inner, leaf.inner, leaf.view)


def _taken(
    parts: Parts, leaf: Prepared, new: Any, when: When, due: jax.Array
) -> tuple[LeafState, Any]:
    """The leaf's states with the new basis, for those of the batch where it is any good."""
    state, inner, view, subspace = leaf.state, leaf.inner, leaf.view, parts.subspace
    taken = due & all_finite(new, len(view.batch)) if not subspace.shared else due
    basis = select(taken, new, state.basis)
    overlap = _overlap(subspace, state.basis, basis, view) if parts.refresh.compares else None
    following, statistics = parts.refresh.schedule(
        state.statistics, when.count, leaf.phase, overlap
    )
    if parts.on_refresh != "keep":
        moved = transfer.transferred(
            parts.on_refresh, parts.inner, inner, subspace, state.basis, basis, view
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
    return (jnp.sum(jnp.square(between), axis=(-2, -1)) / view.rank).astype(jnp.float32)
