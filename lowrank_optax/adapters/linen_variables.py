"""The variables of an adapted Linen model: arrays of adapters, and weights read and changed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from flax import linen as nn
from flax.core import unfreeze
import jax

from lowrank_optax.adapters import groups
from lowrank_optax.adapters.base import Adapter
from lowrank_optax.adapters.folding import Folding, MergedLayer, needs_weight, other_weights_error
from lowrank_optax.matrices.selection import Path, Where
from lowrank_optax.matrices.views import from_matrix, to_matrix
from lowrank_optax.modules.select import select
from lowrank_optax.modules.spec import LayerSpec

Variables: TypeAlias = Mapping[str, Any]

TRAINED, CONSTANTS, MERGED = "adapters", "adapter_constants", "merged_adapters"
"""Collections: arrays that are trained, arrays that are not, and both of adapters merged."""

CHECKSUMS = "checksums"
"""Name beside the arrays of a merged adapter: see `Folding.checksums`."""


class Attached(NamedTuple):
    """One adapter of an `Adapted`: its arguments, and its strength (None: switched off)."""

    method: Adapter
    where: Where
    rank_pattern: Mapping[str, int | tuple[int, ...]]
    alpha_pattern: Mapping[str, float]
    strength: float | None = 1.0

    def at(self, path: Path) -> Adapter:
        """The method of one layer."""
        return groups.method_at(self.method, "/".join(path), self.rank_pattern, self.alpha_pattern)


class LinenLayer(NamedTuple):
    """A layer that an adapter can be attached to.

    Attributes:
      scope: Where its parameters are in the collection ``params``.
      spec: Its weight's name, axes and kind.
      shape: The weight's shape in one layer.
      module: The layer, unbound.
      other_weights: Name of the class that may compute another weight than the parameter: its own,
        or that of a module around it; empty if there is no such class.
    """

    scope: Path
    spec: LayerSpec
    shape: tuple[int, ...]
    module: nn.Module
    other_weights: str = ""


Layers: TypeAlias = dict[Path, LinenLayer]


def with_adapters(
    variables: Variables, key: jax.Array, adapters: Mapping[str, Attached], layers: Layers
) -> dict[str, Any]:
    """The variables with the arrays of adapters that have none yet."""
    there, variables = adapters_in(variables), dict(variables)
    modules = {path: layer.module for path, layer in layers.items()}
    for number, (name, adapter) in enumerate(adapters.items()):
        if name in there:
            continue
        kinds = {p: layer.spec for p, layer in layers.items()}
        default = [p for p, s in kinds.items() if s.by_default and s.kind != "embedding"]
        chosen = list(select(modules, adapter.where, groups.KIND, default=default))
        if needs_weight(adapter.method):
            for path in chosen:
                _check_weight(path, layers[path], f"{type(adapter.method).__name__} reads")
        stacks = [
            groups.Stack(
                path, matrix_of(variables, path, layers[path]), kinds[path].kind == "embedding"
            )
            for path in chosen
        ]
        of_adapter = jax.random.fold_in(key, number)
        patterns = adapter.rank_pattern, adapter.alpha_pattern
        trees = groups.init_trees(of_adapter, adapter.method, stacks, *patterns)
        bases = [(layers[path], base) for path, base in trees.base.items()]
        variables = with_matrices(variables, bases)
        variables = with_arrays(variables, name, (trees.trainable, trees.frozen))
    return variables


def adapters_in(variables: Variables) -> dict[str, bool]:
    """Whether each adapter that there are arrays of is merged, by name.

    Raises:
      ValueError: If there are arrays of one that is merged beside those merged.
    """
    unmerged = {name: False for c in (TRAINED, CONSTANTS) for name in variables.get(c, {})}
    merged = {name: True for name in variables.get(MERGED, {})}
    if both := sorted(unmerged.keys() & merged.keys()):
        raise ValueError(
            f"the adapter {both[0]!r} is merged into these params, and there are arrays of it in "
            f"{TRAINED!r} or {CONSTANTS!r} as well: its change would count twice. Unmerge the "
            "variables, or leave those arrays out."
        )
    return unmerged | merged


def trees_of(variables: Variables, name: str) -> tuple[Any, Any]:
    """The trees of an adapter, merged or not: trained, constant; empty where there is none."""
    merged = variables.get(MERGED, {}).get(name)
    if merged is not None:
        return merged.get(TRAINED, {}), merged.get(CONSTANTS, {})
    return variables.get(TRAINED, {}).get(name, {}), variables.get(CONSTANTS, {}).get(name, {})


def with_arrays(
    variables: Variables, name: str, trees: tuple[Any, Any], checksums: Any = None
) -> dict[str, Any]:
    """The variables with the arrays of one adapter; with checksums, of one that is merged."""
    new = without_arrays(variables, [name])
    by_collection = dict(zip((TRAINED, CONSTANTS), trees, strict=True))
    if checksums is not None:
        merged = {c: t for c, t in (by_collection | {CHECKSUMS: checksums}).items() if t}
        return new | {MERGED: {**new.get(MERGED, {}), name: merged}}
    for collection, tree in by_collection.items():
        if tree:
            new[collection] = {**new.get(collection, {}), name: tree}
    return new


def without_arrays(variables: Variables, names: Iterable[str]) -> dict[str, Any]:
    """The variables without those of these adapters, nor a collection that they leave empty."""
    new, gone = dict(variables), set(names)
    for collection in (TRAINED, CONSTANTS, MERGED):
        others = {k: v for k, v in new.pop(collection, {}).items() if k not in gone}
        if others:
            new[collection] = others
    return new


def weight_of(variables: Variables, path: Path, layer: LinenLayer) -> jax.Array:
    """A layer's weight in ``params``.

    Raises:
      ValueError: If there is no such weight, or its stack axes do not lead.
    """
    if "params" not in variables:
        known = ", ".join(map(repr, variables)) or "nothing"
        raise ValueError(
            f"variables has no collection 'params': it has {known}. Pass {{'params': params}}, "
            "as module.init returns it."
        )
    node = variables["params"]
    try:
        for name in (*layer.scope, layer.spec.weight):
            node = node[name]
    except KeyError:
        raise ValueError(
            f"the layer {'/'.join(path)} has no {layer.spec.weight!r} in the variables: they are "
            "those of another model."
        ) from None
    weight = nn.meta.unbox(node)
    if weight.shape != layer.spec.stack(weight.shape) + layer.shape:
        raise ValueError(
            f"the weight of {'/'.join(path)} has shape {weight.shape} in params, {layer.shape} in "
            "its layer: layers must be stacked along the first axis."
        )
    return weight


def with_matrices(
    variables: Variables, matrices: Sequence[tuple[LinenLayer, jax.Array]]
) -> dict[str, Any]:
    """The variables with other weights, given as matrices ``[..., d_in, d_out]``."""
    if not matrices:
        return dict(variables)
    params = unfreeze(variables["params"])
    for layer, matrix in matrices:
        node = params
        for name in layer.scope:
            node = node[name]
        boxed = node[layer.spec.weight]
        old = nn.meta.unbox(boxed)
        new = from_matrix(matrix, layer.spec.axes, param=old).astype(old.dtype)
        is_box = isinstance(boxed, nn.meta.AxisMetadata)
        node[layer.spec.weight] = boxed.replace_boxed(new) if is_box else new
    return {**variables, "params": params}


def matrix_of(variables: Variables, path: Path, layer: LinenLayer) -> jax.Array:
    """A layer's weight as a matrix ``[..., d_in, d_out]``."""
    return to_matrix(weight_of(variables, path, layer), layer.spec.axes)


def _check_weight(path: Path, layer: LinenLayer, use: str) -> None:
    """Raises TypeError if the layer may multiply by another weight than its parameter."""
    if cls := layer.other_weights:
        raise other_weights_error("/".join(path), use, cls)


def folding_of(
    variables: Variables,
    path: Path,
    layer: LinenLayer,
    methods: Mapping[str, tuple[Adapter, float]],
) -> Folding:
    """Adapters of one layer by name, each with its method and strength, switched off or not."""
    _check_weight(path, layer, "merging, unmerging and detaching change")
    matrix, label = matrix_of(variables, path, layer), "/".join(path)
    *batch, d_in, d_out = matrix.shape
    own, shared = [], []
    for name, (method, _) in methods.items():
        trees = trees_of(variables, name)
        own.append(groups.layers_of(*trees).get(path, {}))
        of_groups = groups.shared_of(*trees)
        shared.append(groups.with_shared(method, {}, of_groups, label, matrix.shape))
    stack, arrays = matrix.reshape(-1, d_in, d_out), (tuple(own), tuple(shared))
    names, with_strengths = tuple(methods), tuple(methods.values())
    return Folding(label, names, with_strengths, stack, tuple(batch), *arrays)


# Functions of their own: a layer's matrix is not held while the next is folded.


def fold(
    variables: Variables,
    path: Path,
    layer: LinenLayer,
    methods: Mapping[str, tuple[Adapter, float]],
) -> tuple[jax.Array, MergedLayer, dict[str, jax.Array]]:
    """A layer's matrix with adapters, a row of the report, and checksums by adapter."""
    folding = folding_of(variables, path, layer, methods)
    return *folding.folded(), folding.checksums()


def unfold(
    variables: Variables,
    path: Path,
    layer: LinenLayer,
    methods: Mapping[str, tuple[Adapter, float]],
    before: Mapping[str, jax.Array],
) -> jax.Array:
    """A layer's matrix without adapters, after their checksums are compared with those before."""
    folding = folding_of(variables, path, layer, methods)
    folding.check_unchanged(before)
    return folding.unfolded()
