"""Leaves of a tree of parameters that have adapters: which they are, and putting others there."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp

from lowrank_optax.adapters import groups
from lowrank_optax.adapters.base import Adapter, counts_of, parameter_count
from lowrank_optax.adapters.groups import KIND
from lowrank_optax.matrices.names import named_kind
from lowrank_optax.matrices.paths import normalised_path
from lowrank_optax.matrices.rules import (
    DimensionNumbersRule,
    default_rule,
    resolve_dimension_numbers,
)
from lowrank_optax.matrices.selection import Where
from lowrank_optax.matrices.views import WeightDimensionNumbers, matrix_shape
from lowrank_optax.modules.select import select


class Leaf(NamedTuple):
    """An adapted leaf.

    Attributes:
      path: Its path.
      spec: Its axes of inputs and outputs, counted from the end.
      method: The method with the rank of this leaf.
      group: The key of the arrays that it shares with others.
      batch: The axes of its matrices, sizes of the stacks.
    """

    path: tuple[str, ...]
    spec: WeightDimensionNumbers
    method: Adapter
    group: str
    batch: tuple[int, ...]

    @property
    def name(self) -> str:
        """The path as patterns see it."""
        return "/".join(self.path)

    def is_transposed(self) -> bool | None:
        """Whether outputs come before inputs; None if these are not the last two axes."""
        axes = (self.spec.reduction_axis, self.spec.output_axis)
        if axes == ((-2,), (-1,)):
            return False
        return True if axes == ((-1,), (-2,)) else None

    def repeated(self, p: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The arrays with the axes of the leaf's matrices in front, also shared ones."""
        return {
            name: jnp.broadcast_to(x, (*self.batch, *x.shape)) if name in self.method.shared else x
            for name, x in p.items()
        }

    def shapes(self, value: jax.Array) -> set[tuple[int, ...]]:
        """The shapes in which the weight, or one of its stack, is met."""
        flat = (*self.batch, *matrix_shape(value.shape, self.spec)[-2:])
        whole = (tuple(value.shape), flat)
        return {shape[n:] for shape in whole for n in range(len(self.batch) + 1)}


def keeping_none_of(shapes: set[tuple[int, ...]]) -> Callable[..., bool]:
    """A policy of ``jax.checkpoint``: what has one of these shapes is computed again."""

    def policy(primitive: Any, *avals: Any, **params: Any) -> bool:
        result, _ = primitive.abstract_eval(*avals, **params)
        results = result if primitive.multiple_results else [result]
        return not any(getattr(x, "shape", None) in shapes for x in results)

    return policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PytreeAdapter:
    """An adapter on a tree of parameters; itself a pytree.

    Attributes:
      trainable: ``PATH/ARRAY`` in nested dictionaries; ``adapter_groups/GROUP/ARRAY`` for those
        that leaves share.
      frozen: Likewise, what is not trained.
      base: By path, leaves that the method has changed (PiSSA's): they take the place of the
        parameters' own, which may be dropped.
      leaves: What it is attached to.
    """

    trainable: dict[str, Any]
    frozen: dict[str, Any]
    base: dict[str, jax.Array]
    leaves: tuple[Leaf, ...] = dataclasses.field(metadata={"static": True})

    def replace(self, trainable: dict[str, Any]) -> "PytreeAdapter":
        """The same adapter with other trained arrays."""
        return dataclasses.replace(self, trainable=trainable)

    def arrays(self) -> dict[tuple[str, ...], dict[str, jax.Array]]:
        """The arrays of each leaf by its path, shared ones too."""
        own = groups.layers_of(self.trainable, self.frozen)
        shared = groups.shared_of(self.trainable, self.frozen)
        return {x.path: {**own.get(x.path, {}), **shared.get(x.group, {})} for x in self.leaves}


Path = tuple[str, ...]


def matrices_of(
    params: Any, where: Where, rule: DimensionNumbersRule
) -> dict[Path, tuple[WeightDimensionNumbers, jax.Array]]:
    """The leaves that are meant, by path: their dimension numbers, from the end, and values.

    Raises:
      ValueError: If one is meant of which names and shapes don't tell the axes.
    """
    leaves = {normalised_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    specs = dict(zip(leaves, resolve_dimension_numbers(rule, params), strict=True))
    default = {path for path, spec in specs.items() if spec is not None}
    if rule is None and where is not None:
        # What is asked for by name need not be one of those chosen without being asked for.
        # Embeddings and heads may be; stacked biases only look like matrices.
        may_be = lambda path: named_kind(path) not in ("biases", "scales")
        every = resolve_dimension_numbers(lambda p: default_rule(p, may_be), params)
        specs = {path: specs[path] or spec for path, spec in zip(leaves, every, strict=True)}
    known = {path: leaf for path, leaf in leaves.items() if specs[path] is not None}
    unclear = {} if rule is not None else _unclear(leaves, specs, where is None)
    things = {p: x for p, x in leaves.items() if p in known or p in unclear}
    by_default = [path for path in things if path in default]
    found = select(things, where, KIND, default=by_default)
    left_out = unclear if where is None else [path for path in found if path in unclear]
    if left_out:
        path = next(iter(left_out))
        message = (
            f"{'/'.join(path)} {leaves[path].shape}, of which names and shapes don't tell the axes "
            "of inputs and outputs: give weight_dimension_numbers, as WeightDimensionNumbers(-2, "
            "-1) for stacks of [d_in, d_out]."
        )
        if where is not None:
            raise ValueError(f"where={where!r} matches {message}")
        warnings.warn(f"no adapter is attached to {message}", stacklevel=3)
    return {path: (_from_the_end(specs[path], leaves[path].ndim), leaves[path]) for path in found}


def _unclear(leaves: dict[Path, Any], specs: dict[Path, Any], weights: bool) -> dict[Path, Any]:
    """Leaves of three axes or more without dimension numbers; embeddings only if asked for."""
    no_weight = ("adapters", "biases", "scales", "norms")
    may_be = lambda kind: kind is None if weights else kind not in no_weight
    return {
        path: x
        for path, x in leaves.items()
        if specs[path] is None and x.ndim > 2 and may_be(named_kind("/".join(path)))
    }


def replaced(
    params: Any,
    adapter: PytreeAdapter,
    one: Callable[[Leaf, jax.Array, dict[str, jax.Array]], Any],
    *,
    from_base: bool = True,
) -> Any:
    """The tree with ``one(leaf, value, arrays)`` in the place of each adapted leaf.

    Args:
      params: The tree.
      adapter: Its adapter.
      one: What makes the new leaf.
      from_base: Whether values of leaves that the method changed are the changed ones.

    Raises:
      ValueError: If the tree has no such leaf.
    """
    arrays, leaves = adapter.arrays(), {x.path: x for x in adapter.leaves}
    paths = {normalised_path(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)}
    for leaf in adapter.leaves:
        if leaf.path not in paths:
            raise ValueError(f"params has no leaf {leaf.name}: the adapter is that of other ones.")

    def new(path: Any, value: Any) -> Any:
        leaf = leaves.get(normalised_path(path))
        if leaf is None:
            return value
        base = adapter.base.get(leaf.name, value) if from_base else value
        return one(leaf, base, arrays[leaf.path])

    return jax.tree_util.tree_map_with_path(new, params)


def summary_of(params: Any, adapter: PytreeAdapter) -> Any:
    """See `pytree.summary`."""
    from lowrank_optax.adapters.summaries import AdapterSummary, SummaryRow, row_of

    trees = adapter.trainable, adapter.frozen
    values = {normalised_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    rows = []
    for leaf in adapter.leaves:
        own = [groups.layers_of(tree, {}).get(leaf.path, {}) for tree in trees]
        matrix = matrix_shape(values[leaf.path].shape, leaf.spec)
        rows.append(row_of(leaf.name, matrix, "default", leaf.method, counts_of(*own), 1.0))
    for group in groups.shared_of(*trees):
        of = [groups.shared_of(tree, {}).get(group, {}) for tree in trees]
        label = f"{groups.GROUPS}/{group}"
        rows.append(SummaryRow(label, "–", "default", "shared", None, *counts_of(*of), ""))
    return AdapterSummary(rows, parameter_count(params))


def _from_the_end(spec: WeightDimensionNumbers | None, ndim: int) -> WeightDimensionNumbers:
    if spec is None:
        raise TypeError("a leaf without dimension numbers cannot be adapted.")
    as_tuple = lambda axis: (axis,) if isinstance(axis, int) else tuple(axis)
    last = lambda axes: tuple(axis % ndim - ndim for axis in as_tuple(axes))
    return WeightDimensionNumbers(last(spec.reduction_axis), last(spec.output_axis))
