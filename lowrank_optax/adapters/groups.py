"""Initial values of an adapter on the weights of a model whose arrays are plain trees.

The hosts `linen` and `pytree` select the weights, as stacks of matrices; here the method gets its
ranks by pattern, weights are put into groups, and every array gets its key.
"""

from collections.abc import Hashable, Mapping, Sequence
import dataclasses
import re
from typing import Any, NamedTuple

import jax

from lowrank_optax.adapters.base import Adapter, AdapterParams, Arrays, Weights
from lowrank_optax.matrices import selection

KIND = "layer that an adapter could be attached to"
"""What is selected, for messages."""

GROUPS = "adapter_groups"
"""Key of the arrays that layers share in an adapter's tree: ``adapter_groups/GROUP/NAME``."""


class Stack(NamedTuple):
    """One weight of a model.

    Attributes:
      path: Path of the weight, without a collection.
      weights: ``[*batch, d_in, d_out]``, an array or a shape.
      embedding: Whether its rows are looked up.
    """

    path: tuple[str, ...]
    weights: Weights
    embedding: bool = False

    @property
    def name(self) -> str:
        """The path as patterns see it."""
        return "/".join(self.path)


class Trees(NamedTuple):
    """The arrays of an adapter on a model, in nested dictionaries ``path -> name -> array``.

    Attributes:
      trainable: Arrays that are trained.
      frozen: Arrays that are not.
      base: ``path -> [*batch, d_in, d_out]``: the weights that the method has changed.
    """

    trainable: dict[str, Any]
    frozen: dict[str, Any]
    base: dict[tuple[str, ...], jax.Array]


def check_method(method: Any) -> None:
    """Raises TypeError unless this is an adapter."""
    if not isinstance(method, Adapter):
        raise TypeError(f"method={method!r} must be an adapter, for example LoRA(rank=8).")


def method_at(
    method: Adapter,
    name: str,
    rank_pattern: Mapping[str, int | tuple[int, ...]],
    alpha_pattern: Mapping[str, float],
) -> Adapter:
    """The method of one layer, with the values of the first patterns found in its path.

    Raises:
      ValueError: If a pattern is found for an option that the method does not have.
    """
    changes = {}
    for field, patterns in (("rank", rank_pattern), ("alpha", alpha_pattern)):
        found = [value for pattern, value in patterns.items() if re.search(pattern, name)]
        if found:
            if not hasattr(method, field):
                raise ValueError(
                    f"{field}_pattern means {name}, and {type(method).__name__} has no {field}: "
                    "leave it out."
                )
            changes[field] = found[0]
    return dataclasses.replace(method, **changes)


def check_patterns(
    names: Sequence[str], rank_pattern: Mapping[str, Any], alpha_pattern: Mapping[str, Any]
) -> None:
    """Raises ValueError for a pattern that is found in no layer's name."""
    layers = [tuple(name.split("/")) for name in names]
    for argument, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        selection.check_patterns(argument, patterns, layers, "layer with this adapter")


def group_name(group: Hashable) -> str:
    """A group's key in a tree: ``("query", (16, 8))`` is ``query-16-8``."""
    parts = [x for x in jax.tree.leaves(group) if x is not None]
    return "-".join(str(part).replace("/", ".") for part in parts)


def group_of(method: Adapter, name: str, matrix: Sequence[int]) -> str:
    """The key of the group of a layer with this path and a weight of this shape."""
    d_in, d_out = matrix[-2:]
    return group_name(method.group(name, (d_in, d_out)))


def init_trees(
    key: jax.Array,
    method: Adapter,
    stacks: Sequence[Stack],
    rank_pattern: Mapping[str, int | tuple[int, ...]],
    alpha_pattern: Mapping[str, float],
) -> Trees:
    """All arrays of an adapter on these weights; patterns as for `attach`.

    Raises:
      ValueError: If a pattern is found in no path.
    """
    check_patterns([stack.name for stack in stacks], rank_pattern, alpha_pattern)
    groups: dict[Hashable, list[tuple[Stack, Adapter]]] = {}
    for stack in stacks:
        own = method_at(method, stack.name, rank_pattern, alpha_pattern)
        d_in, d_out = stack.weights.shape[-2:]
        groups.setdefault(own.group(stack.name, (d_in, d_out)), []).append((stack, own))
    names = [group_name(group) for group in groups]
    if len(set(names)) != len(names):
        raise ValueError(f"groups of {type(method).__name__} have the same name: {sorted(names)}.")
    trees = Trees({}, {}, {})
    for number, (name, members) in enumerate(zip(names, groups.values(), strict=True)):
        _init_group(trees, jax.random.fold_in(key, number), name, members)
    return trees


def init_group(
    key: jax.Array,
    members: Sequence[Adapter],
    weights: Sequence[Weights],
    embeddings: Sequence[bool],
) -> tuple[AdapterParams, list[AdapterParams]]:
    """The arrays that layers of a group share, and the own ones of each.

    Args:
      key: PRNG key.
      members: The method of each layer, which may differ in rank and alpha.
      weights: The weights of each layer, ``[L, d_in, d_out]``.
      embeddings: Whether the rows of each are looked up.
    """
    shared = members[0].init_shared(jax.random.fold_in(key, 0), weights)
    together = shared.trainable | shared.frozen
    own = [
        method.init_layers(jax.random.fold_in(key, number), stack, together, embedding=embedding)
        for number, (method, stack, embedding) in enumerate(
            zip(members, weights, embeddings, strict=True), start=1
        )
    ]
    return shared, own


def _init_group(
    trees: Trees, key: jax.Array, group: str, members: Sequence[tuple[Stack, Adapter]]
) -> None:
    stacks, methods = zip(*members, strict=True)
    flat = lambda x: x.reshape(-1, *x.shape[-2:])
    weights = [
        flat(x.weights) if methods[0].reads_weights else jax.eval_shape(flat, x.weights)
        for x in stacks
    ]
    shared, own = init_group(key, methods, weights, [stack.embedding for stack in stacks])
    _put(trees, (GROUPS, group), shared)
    for stack, drawn in zip(stacks, own, strict=True):
        batch = stack.weights.shape[:-2]
        _put(trees, stack.path, jax.tree.map(lambda x, b=batch: x.reshape(*b, *x.shape[1:]), drawn))


def _put(trees: Trees, path: tuple[str, ...], params: AdapterParams) -> None:
    for tree, arrays in ((trees.trainable, params.trainable), (trees.frozen, params.frozen)):
        if arrays:
            node = tree
            for name in path:
                node = node.setdefault(name, {})
            node.update(arrays)
    if params.base is not None:
        trees.base[path] = params.base


def layers_of(
    trainable: Mapping[str, Any], frozen: Mapping[str, Any]
) -> dict[tuple[str, ...], dict[str, jax.Array]]:
    """The arrays of each layer by its path, trained and frozen ones together; no shared ones."""
    from flax.traverse_util import flatten_dict

    layers: dict[tuple[str, ...], dict[str, jax.Array]] = {}
    for tree in (trainable, frozen):
        flat: dict[tuple[str, ...], Any] = dict(flatten_dict(_plain(tree)))
        for (*path, name), array in flat.items():
            if path[:1] != [GROUPS]:
                layers.setdefault(tuple(path), {})[name] = array
    return layers


def shared_of(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Arrays]:
    """The arrays of each group by its name."""
    found: dict[str, Arrays] = {}
    for tree in (trainable, frozen):
        for group, arrays in tree.get(GROUPS, {}).items():
            found[group] = {**found.get(group, {}), **arrays}
    return found


def with_shared(
    method: Adapter, own: Arrays, shared: Mapping[str, Arrays], name: str, matrix: Sequence[int]
) -> dict[str, jax.Array]:
    """All arrays of a layer: its own and those of its group."""
    if not shared:
        return dict(own)
    return {**own, **shared.get(group_of(method, name, matrix), {})}


def _plain(tree: Any) -> Any:
    """Without Flax's ``FrozenDict``."""
    if isinstance(tree, Mapping):
        return {name: _plain(child) for name, child in tree.items()}
    return tree
