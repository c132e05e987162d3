"""Parameters in groups, and the layers of stacked ones: all static, found when a step is traced."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.matrices import DimensionNumbersRule, resolve_dimension_numbers
from lowrank_optax.matrices.flax_rules import stack_around
from lowrank_optax.matrices.paths import normalised_path, path_string
from lowrank_optax.schedules.weight_decay.masks import parameter_kinds

LabelRule: TypeAlias = Callable[[str], str | None] | None
"""From a path, ``blocks/mlp/up/kernel``, to the name of its group, or None to leave it out; None
stands for the kinds of `parameter_kinds`."""

ALL = "all"


class Groups(NamedTuple):
    """Which leaf, or layer of a leaf, belongs to which groups.

    Attributes:
      labels: Names of the groups: "all", then each group followed by its layers, "matrices/0".
      stacked: For each leaf whether it counts as layers, one unit each; None where it is left out.
      units: Of each pair of a unit and a group that it belongs to, the unit,
      groups: and the group.
      sizes: Number of elements of each unit.
    """

    labels: tuple[str, ...]
    stacked: tuple[bool | None, ...]
    units: np.ndarray
    groups: np.ndarray
    sizes: np.ndarray

    def total(self, of_units: np.ndarray) -> np.ndarray:
        """Sums over the units of each group."""
        sums = np.zeros(len(self.labels))
        np.add.at(sums, self.groups, of_units[self.units])
        return sums


def find_groups(
    tree: Any, rule: LabelRule, per_layer: bool, dimension_numbers: DimensionNumbersRule
) -> Groups:
    """The groups of a tree of parameters or updates; by paths, so that both give the same."""
    labels = leaf_labels(tree, rule)
    leaves = [leaf for _, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    layers = _layers(tree, dimension_numbers) if per_layer else [0] * len(leaves)
    order: dict[str, list[str]] = {}
    members, sizes, stacked = [], [], []
    for leaf, label, count in zip(leaves, labels, layers, strict=True):
        if label is None or not jnp.issubdtype(leaf.dtype, jnp.floating):
            stacked.append(None)
            continue
        stacked.append(count > 0)
        below = order.setdefault(label, [])
        for layer in range(max(count, 1)):
            names = [ALL, label] + ([f"{label}/{layer}"] if count else [])
            below += [name for name in names[2:] if name not in below]
            members += [(len(sizes), name) for name in names]
            sizes.append(math.prod(leaf.shape[1:] if count else leaf.shape))
    names = (ALL, *(name for label, below in order.items() for name in (label, *below)))
    names = tuple(dict.fromkeys(names))
    units = np.array([unit for unit, _ in members], np.int32)
    groups = np.array([names.index(name) for _, name in members], np.int32)
    return Groups(names, tuple(stacked), units, groups, np.array(sizes, np.float64))


def leaf_labels(tree: Any, rule: LabelRule) -> list[str | None]:
    """The label of each leaf, in the order of ``jax.tree.leaves``."""
    if rule is None:
        return jax.tree.leaves(parameter_kinds(tree))
    labels = [rule(path_string(path)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for label in labels:
        if label is not None and not isinstance(label, str):
            raise TypeError(f"groups gave {label!r} for a path; it must give a name, or None.")
    return labels


def _layers(tree: Any, rule: DimensionNumbersRule) -> list[int]:
    """For each leaf the number of layers stacked on its first axis; 0 where it is not stacked."""
    specs = resolve_dimension_numbers(rule, tree)
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [normalised_path(path) for path, _ in paths_and_leaves]
    shapes = [tuple(leaf.shape) for _, leaf in paths_and_leaves]
    stacks = {
        path: shape[:1] if _first_is_batch(shape, spec) else ()
        for path, shape, spec in zip(paths, shapes, specs, strict=True)
        if spec is not None
    }
    # The norms and biases of stacked matrices are stacked too.
    counts = []
    for path, shape in zip(paths, shapes, strict=True):
        stack = stacks.get(path)
        if stack is None and len(shape) > 1:
            stack = stack_around(path, shape, stacks)
        counts.append(stack[0] if stack else 0)
    return counts


def _first_is_batch(shape: tuple[int, ...], spec: Any) -> bool:
    axes = np.concatenate([np.ravel(spec.reduction_axis), np.ravel(spec.output_axis)])
    return 0 not in axes % len(shape)
