"""The state of `scale_by_projection`, put together from what is kept for each leaf."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from lowrank_optax.projection.leaf import LeafState, Parts, init_leaf
from lowrank_optax.projection.records import gather, spread
from lowrank_optax.projection.view import View

_EXAMPLE = View((1, 1), -2, 1)


class ScaleByProjectionState(NamedTuple):
    """State of `scale_by_projection`: parallel trees, one array for each matrix leaf.

    Where a rule keeps several arrays for a leaf, the field is a record of trees; where it keeps
    none, ``()``. Leaves that are not matrices have ``MaskedNode``.

    Attributes:
      count: Number of updates so far. shape=(), dtype=int32.
      basis: What the subspace rule keeps: a basis ``[*batch, d, r]`` in float32, zero until the
        first gradient that is finite and not zero; or indices, or one seed for all leaves.
      next_refresh: The count from which on the basis is due to be found anew, ``[*batch]`` int32
        (or one for all leaves); at first zero or less.
      statistics: What the refresh rule keeps.
      residual: What the residual rule keeps.
      accumulated: Sum of projected gradients since the last step; ``()`` without accumulation.
      inner: State of the inner transformation, on the tree of projected gradients. Where that is
        run on each leaf alone, the state of one with a tree in the place of each array.
      others: State of the transformation of other leaves; ``()`` without one.
    """

    count: jax.typing.ArrayLike
    basis: Any
    next_refresh: Any
    statistics: Any
    residual: Any
    accumulated: Any
    inner: optax.OptState
    others: optax.OptState


def pack(
    parts: Parts,
    treedef: jax.tree_util.PyTreeDef,
    states: Sequence[LeafState | None],
    without_leaves: Callable[[], LeafState] | None = None,
) -> LeafState:
    """A record of trees from the states of the leaves; one basis for all if the rule shares it.

    ``without_leaves`` gives that basis where no leaf is a matrix; None before the first gradient.
    """
    structure = _structure(parts)
    if not parts.subspace.shared:
        return spread(treedef, states, structure)
    own = [None if s is None else s._replace(basis=(), next_refresh=()) for s in states]
    first = next((s for s in states if s is not None), None)
    if first is None:
        first = init_leaf(parts, _EXAMPLE, 0.0) if without_leaves is None else without_leaves()
    trees = spread(treedef, own, structure)
    return trees._replace(basis=first.basis, next_refresh=first.next_refresh)


def unpack(
    parts: Parts, treedef: jax.tree_util.PyTreeDef, state: ScaleByProjectionState
) -> list[LeafState]:
    """The inverse of `pack`: the state of each leaf (of no meaning where it is not a matrix)."""
    trees = LeafState(state.basis, state.next_refresh, state.statistics, state.residual)
    if not parts.subspace.shared:
        return gather(treedef, trees, _structure(parts))
    own = gather(treedef, trees._replace(basis=(), next_refresh=()), _structure(parts))
    return [s._replace(basis=state.basis, next_refresh=state.next_refresh) for s in own]


def _structure(parts: Parts) -> jax.tree_util.PyTreeDef:
    """The structure of one leaf's state, also where no leaf is a matrix."""
    shared = parts.subspace.shared
    example = lambda: LeafState(
        () if shared else parts.subspace.kept,
        () if shared else 0,
        parts.refresh.init(_EXAMPLE),
        parts.residual.init(_EXAMPLE),
    )
    return jax.tree.structure(jax.eval_shape(example))
