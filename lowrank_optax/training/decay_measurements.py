"""What is measured of weights and their final update: groups of parameters, and their numbers.

Everything about groups is static: it is found when a step is traced.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from lowrank_optax.matrices import DimensionNumbersRule, resolve_dimension_numbers
from lowrank_optax.matrices.arithmetic import summed_together
from lowrank_optax.matrices.explicit_sharding import constrain, partition_of
from lowrank_optax.matrices.flax_rules import stack_around
from lowrank_optax.matrices.paths import normalised_path, path_string
from lowrank_optax.training.decay_masks import parameter_kinds
from lowrank_optax.training.weight_decay_equilibrium import Optimizer, equilibrium, momentum_of

LabelRule: TypeAlias = Callable[[str], str | None] | None
"""Function from a path, ``blocks/mlp/up/kernel``, to the name of its group, or None to leave it
out. Instead of a function, None: the kinds of `parameter_kinds`."""

ALL = "all"

MEASURED = (
    "weight_norm",
    "weight_rms",
    "update_rms",
    "relative_update",
    "rotation",
    "effective_learning_rate",
    "relative_learning_rate",
    "decay_share",
    "rounding_loss",
    "decay_lost",
    "equilibrium_norm",
    "equilibrium_rotation",
)
"""Names of the numbers of a group; see `monitor_weight_decay`."""

ABSENT = -1.0  # stands in the state for an unknown number: all others are ≥ 0


class Groups(NamedTuple):
    """Which leaf, or layer of a leaf, belongs to which groups.

    Attributes:
      labels: Names of the groups: "all", then each group followed by its layers, "matrices/0".
      stacked: For each leaf whether it counts as layers, one unit each; None if it has no group.
      units: Unit of each pair of a unit and one of its groups.
      groups: Group of each pair.
      sizes: Number of elements of each unit.
    """

    labels: tuple[str, ...]
    stacked: tuple[bool | None, ...]
    units: np.ndarray
    groups: np.ndarray
    sizes: np.ndarray

    def total(self, of_units: np.ndarray) -> np.ndarray:
        """The sum over the units of each group."""
        return np.bincount(self.groups, of_units[self.units], len(self.labels))


def find_groups(
    tree: Any, rule: LabelRule, per_layer: bool, dimension_numbers: DimensionNumbersRule
) -> Groups:
    """The groups of a tree of parameters or updates; by paths, so both result in the same."""
    leaves = jax.tree.leaves(tree)
    layers = _layers(tree, dimension_numbers) if per_layer else [0] * len(leaves)
    names: dict[str, dict[str, None]] = {}  # each label with its layers, in order
    members, sizes, stacked = [], [], []
    for leaf, label, count in zip(leaves, leaf_labels(tree, rule), layers, strict=True):
        if label is None or not jnp.issubdtype(leaf.dtype, jnp.floating):
            stacked.append(None)
            continue
        stacked.append(count > 0)
        own = [f"{label}/{layer}" for layer in range(count)]
        names.setdefault(label, {label: None}).update(dict.fromkeys(own))
        for layer in own or [label]:
            members += [(len(sizes), name) for name in dict.fromkeys((ALL, label, layer))]
            sizes.append(math.prod(leaf.shape[1:] if count else leaf.shape))
    labels = tuple(dict.fromkeys((ALL, *(name for group in names.values() for name in group))))
    units = np.array([unit for unit, _ in members], np.int32)
    groups = np.array([labels.index(name) for _, name in members], np.int32)
    return Groups(labels, tuple(stacked), units, groups, np.array(sizes, np.float64))


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
    """For each leaf the number of layers stacked on its first axis; 0 if it is not stacked."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shapes = [(normalised_path(path), tuple(leaf.shape)) for path, leaf in leaves]
    stacks = {}  # of matrices
    for (path, shape), spec in zip(shapes, resolve_dimension_numbers(rule, tree), strict=True):
        if spec is not None:
            axes = np.concatenate([np.ravel(spec.reduction_axis), np.ravel(spec.output_axis)])
            stacks[path] = () if 0 in axes % len(shape) else shape[:1]

    def count(path: Any, shape: tuple[int, ...]) -> int:
        stack = stacks.get(path)
        if stack is None and len(shape) > 1:  # norms and biases of stacked matrices
            stack = stack_around(path, shape, stacks)
        return stack[0] if stack else 0

    return [count(path, shape) for path, shape in shapes]


def leaf_sums(weight: jax.Array, update: jax.Array, stacked: bool, decays: bool) -> jax.Array:
    """Six sums over a leaf, or over each layer of a stacked one, in float32: ``[layers, 6]``.

    ⟨w, w⟩, ⟨w, d⟩, ⟨d, d⟩; the number of elements whose update is lost, and their share of ⟨w, w⟩;
    ⟨w, w⟩ once more if the leaf decays. Weight and update are read once.
    """
    w, d = weight.astype(jnp.float32), update.astype(jnp.float32)
    lost = is_lost(weight, update)
    squares = w * w
    products = (squares, w * d, d * d, lost.astype(jnp.int32), jnp.where(lost, squares, 0.0))
    first = int(stacked and w.ndim > 0)
    if w.ndim > first:  # row by row: one long sum would lose small numbers
        products = summed_together(products, w.ndim - 1)
    sums = [jnp.sum(x, tuple(range(first, x.ndim)), dtype=jnp.float32) for x in products]
    sums.append(sums[0] if decays else jnp.zeros_like(sums[0]))
    # On a mesh of explicit axes whole on every device, as the state is.
    whole = lambda x: (
        x if partition_of(x) is None else constrain(x, PartitionSpec(*[None] * x.ndim))
    )
    return jnp.stack([whole(x) for x in sums], -1).reshape(-1, 6)


def is_lost(weight: jax.Array, update: jax.Array) -> jax.Array:
    """Where a nonzero update does not change the weight, rounded to its own dtype."""
    total = weight.astype(jnp.float32) + update.astype(jnp.float32)
    info = jnp.finfo(weight.dtype)
    if info.bits < 32:
        # A cast back and forth might be removed by the compiler as excess precision.
        total = jax.lax.reduce_precision(total, info.nexp, info.nmant)
    return (total == weight.astype(jnp.float32)) & (update != 0)


def rotation_angle(ww: Any, wd: Any, dd: Any) -> jax.Array:
    r"""The angle in radians between :math:`w` and :math:`w + d`, from their products.

    :math:`\mathrm{atan2}\bigl(\sqrt{\lVert d \rVert^2 - p^2}, \lVert w \rVert + p\bigr)` with
    :math:`p = \langle w, d \rangle / \lVert w \rVert` is accurate in float32 for updates of any
    size; the arccos of a cosine rounds angles below 3e-4 to zero. 0 for weights of zero.

    Example:
      >>> import jax.numpy as jnp
      >>> w, d = jnp.array([1.0, 0.0]), jnp.array([0.0, 1e-5])
      >>> print(f"{rotation_angle(w @ w, w @ d, d @ d):.2e}")
      1.00e-05
    """
    norm = jnp.sqrt(ww)
    return jnp.where(ww == 0, 0.0, jnp.arctan2(_across(ww, wd, dd), norm + ratio(wd, norm)))


def _across(ww: Any, wd: Any, dd: Any) -> jax.Array:
    """The norm of the part of :math:`d` that is orthogonal to :math:`w`."""
    return jnp.sqrt(jnp.maximum(dd - wd * ratio(wd, ww), 0.0))


def ratio(a: Any, b: jax.Array) -> jax.Array:
    """``a / b``, and 0 where ``b`` is 0; NaN stays NaN."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def measure(
    sums: jax.Array,
    sizes: np.ndarray,
    decaying: np.ndarray,
    learning_rate: jax.Array | None,
    weight_decay: jax.Array | None,
    optimizer: Optimizer,
    momentum: Any,
) -> dict[str, jax.Array]:
    """The numbers in `MEASURED`, ``[groups]`` each, from sums ``[groups, 6]`` of `leaf_sums`.

    ``decaying`` is whether all of a group decays: only then it has an equilibrium.
    """
    ww, wd, dd, lost, lost_ww, decayed_ww = sums.T
    norm, update_norm = jnp.sqrt(ww), jnp.sqrt(dd)
    root_size = np.sqrt(np.maximum(sizes, 1)).astype(np.float32)
    size = jnp.asarray(sizes, jnp.float32)
    numbers = dict.fromkeys(MEASURED, jnp.full_like(norm, ABSENT)) | {
        "weight_norm": norm,
        "weight_rms": norm / root_size,
        "update_rms": update_norm / root_size,
        "relative_update": ratio(update_norm, norm),
        "rotation": rotation_angle(ww, wd, dd),
        "rounding_loss": ratio(lost, size),
        "decay_lost": ratio(lost_ww, ww),
    }
    if learning_rate is None:
        return numbers
    numbers["effective_learning_rate"] = ratio(learning_rate, ww)
    numbers["relative_learning_rate"] = ratio(learning_rate, norm)
    if weight_decay is None:
        return numbers
    shrinkage = learning_rate * weight_decay
    numbers["decay_share"] = ratio(shrinkage * jnp.sqrt(decayed_ww), update_norm)
    momentum = momentum_of(optimizer, momentum)
    # Of SGD, whose update across the weights is η times an average of gradients.
    unit_gradient_norm = _across(ww, wd, dd) * norm * jnp.sqrt(1 - momentum**2)
    unit_gradient_norm /= jnp.where(learning_rate == 0, 1.0, learning_rate)
    predicted = equilibrium(
        optimizer,
        learning_rate,
        weight_decay,
        momentum=momentum,
        size=size,
        unit_gradient_norm=unit_gradient_norm,
    )
    exists = jnp.asarray(decaying) & (shrinkage > 0)
    numbers["equilibrium_norm"] = jnp.where(exists, predicted.norm, ABSENT)
    numbers["equilibrium_rotation"] = jnp.where(exists, predicted.rotation, ABSENT)
    return numbers
