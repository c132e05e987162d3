"""The state of `scale_by_projection` and of its inner optimizer: as trees, and leaf by leaf."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.projection.inner_moments import init_one
from lowrank_optax.projection.leaf import LeafState, Parts, init_leaf
from lowrank_optax.projection.view import View, over_batch

_EXAMPLE = View((1, 1), -2, 1)


class ScaleByProjectionState(NamedTuple):
    """State of `scale_by_projection`: parallel trees, one array for each matrix leaf.

    Where a rule stores several arrays for a leaf, the field is a record of trees; where it stores
    nothing, ``()``. Leaves that are not matrices have ``MaskedNode``.

    Attributes:
      count: Number of updates so far. shape=(), dtype=int32.
      basis: State of the subspace rule: a basis ``[*batch, d, r]`` in float32, zero until the first
        gradient that is finite and not zero; or indices, or one seed for all leaves.
      next_refresh: Count from which on the basis needs a refresh, ``[*batch]`` int32 (or one for
        all leaves); zero or less at first.
      statistics: State of the refresh rule.
      residual: State of the residual rule.
      accumulated: Sum of projected gradients since the last step; ``()`` without accumulation.
      inner: State of the inner transformation, on the tree of projected gradients. Where that runs
        on each leaf separately, the state for one leaf with a tree in place of each array.
      non_matrix_transform: State of the transformation of other leaves; ``()`` without one.
    """

    count: jax.typing.ArrayLike
    basis: Any
    next_refresh: Any
    statistics: Any
    residual: Any
    accumulated: Any
    inner: optax.OptState
    non_matrix_transform: optax.OptState


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
        () if shared else parts.subspace.example,
        () if shared else 0,
        parts.refresh.init(_EXAMPLE),
        parts.residual.init(_EXAMPLE),
    )
    return jax.tree.structure(jax.eval_shape(example))


def spread(
    treedef: jax.tree_util.PyTreeDef, values: Sequence[Any], structure: jax.tree_util.PyTreeDef
) -> Any:
    """One record of trees from a record for each leaf; ``MaskedNode`` where a leaf has None.

    (nnx.Optimizer stores an array for each parameter, not a record.)
    """
    for value in values:
        if value is not None and jax.tree.structure(value) != structure:
            raise ValueError(
                "the inner optimizer's state differs from leaf to leaf, so it can not be reset or "
                "rotated leaf by leaf; give non_matrix_transform=, a transformation of its own for "
                f"leaves that are no matrices. The states: {structure} and "
                f"{jax.tree.structure(value)}."
            )
    rows = [
        [optax.MaskedNode()] * structure.num_leaves if v is None else jax.tree.leaves(v)
        for v in values
    ]
    columns = zip(*rows, strict=True) if rows else [()] * structure.num_leaves
    return structure.unflatten([treedef.unflatten(column) for column in columns])


def gather(
    treedef: jax.tree_util.PyTreeDef, trees: Any, structure: jax.tree_util.PyTreeDef
) -> list[Any]:
    """The inverse of `spread`: a record for each leaf, of ``MaskedNode`` where it had None."""
    columns = [treedef.flatten_up_to(tree) for tree in structure.flatten_up_to(trees)]
    rows = zip(*columns, strict=True) if columns else [()] * treedef.num_leaves
    return [structure.unflatten(row) for row in rows]


class InnerRunner(NamedTuple):
    """The inner optimizer, and the transformation of other leaves (`inner` if None), for one tree.

    Where moments are reset or rotated, they must be found in the inner state of one leaf, and a
    reset must restart the count of that matrix alone. The inner optimizer then runs on single
    matrices, mapped over leaves and their batch axes; otherwise on the whole projected tree.
    """

    parts: Parts
    non_matrix: optax.GradientTransformationExtraArgs | None
    treedef: jax.tree_util.PyTreeDef
    views: Sequence[View | None]
    leaves: Sequence[Any]

    def init(self, zeros: Sequence[jax.Array]) -> tuple[Any, Any]:
        """The states of both, for zeros like the projected gradients."""
        other = () if self.non_matrix is None else self.non_matrix.init(self._tree(zeros, False))
        inner = self.parts.inner
        if not self.parts.each_alone:
            return inner.init(self._tree(zeros)), other
        each = [init_one(inner, x, ndim) if mine else None for mine, x, ndim in self._each(zeros)]
        return self.join(each), other

    def split(self, state: Any) -> list[Any]:
        """The inner state of each leaf that has one of its own; None for others."""
        if not self.parts.each_alone:
            return [None] * len(self.views)
        each = gather(self.treedef, state, self._structure())
        return [x if mine else None for mine, x, _ in self._each(each)]

    def join(self, each: Sequence[Any], state: Any = None) -> Any:
        """The inverse of `split`; ``state`` where there is one for the tree."""
        return spread(self.treedef, each, self._structure()) if self.parts.each_alone else state

    def update(
        self,
        gradients: Sequence[jax.Array],
        each: Sequence[Any],
        state: Any,
        other_state: Any,
        params: Sequence[jax.Array] | None,
        extra_args: dict[str, Any],
    ) -> tuple[list[Any], Any, Any]:
        """The answers to projected gradients (and those of other leaves), and the new states."""
        inner, flat = self.parts.inner, self.treedef.flatten_up_to
        answers: list[Any]
        if self.parts.each_alone:
            update = lambda g, s, p: inner.update(g, s, p, **extra_args)
            rows = zip(self._each(gradients), each, params or [None] * len(each), strict=True)
            pairs = [
                over_batch(update, ndim)(gradient, own, param) if mine else (None, None)
                for (mine, gradient, ndim), own, param in rows
            ]
            answers, states = ([pair[i] for pair in pairs] for i in (0, 1))
            state = self.join(states)
        else:
            given = None if params is None else self._tree(params)
            updates, state = inner.update(self._tree(gradients), state, given, **extra_args)
            answers = flat(updates)
        if self.non_matrix is not None:
            given = None if params is None else self._tree(params, False)
            updates, other_state = self.non_matrix.update(
                self._tree(gradients, False), other_state, given, **extra_args
            )
            triples = zip(self.views, answers, flat(updates), strict=True)
            answers = [other if view is None else own for view, own, other in triples]
        return answers, state, other_state

    def _each(self, xs: Sequence[Any]) -> list[tuple[bool, Any, int]]:
        """For each leaf: whether the inner optimizer handles it, ``x``, number of batch axes."""
        every, pairs = self.non_matrix is None, zip(self.views, xs, strict=True)
        return [(every or v is not None, x, 0 if v is None else len(v.batch)) for v, x in pairs]

    def _tree(self, xs: Sequence[Any], mine: bool = True) -> Any:
        """The tree of what the inner optimizer handles, or (not ``mine``) the other one."""
        chosen = [x if m == mine else optax.MaskedNode() for m, x, _ in self._each(xs)]
        return self.treedef.unflatten(chosen)

    def _structure(self) -> jax.tree_util.PyTreeDef:
        """The structure of the inner state of one leaf."""
        shapes: list[tuple[int, ...]] = [
            leaf.shape if view is None else view.projected_shape[-2:]
            for view, leaf in zip(self.views, self.leaves, strict=True)
            if self.non_matrix is None or view is not None
        ]
        example = jax.ShapeDtypeStruct(shapes[0] if shapes else (1, 1), jnp.float32)
        return jax.tree.structure(jax.eval_shape(self.parts.inner.init, example))
