"""What a transformation is told that is given a part of a tree: the extra argument ``whole``."""

from typing import Any, NamedTuple

import jax


class Whole(NamedTuple):
    """The tree of which ``update`` is given a part.

    Transformations that look at nothing but the arrays they are given need none of it. One that
    goes by the size of a leaf, its place among the others, or random numbers finds here what these
    are in the whole tree.

    Attributes:
      tree: The whole tree, of shapes and dtypes: of the parameters, or of the gradients where
        ``update`` is given no parameters.
      paths: Path of each leaf of the whole tree of gradients.
      row: Of slices of leaves along their first axis, the first row, int32; None for whole leaves.
      settled: Whether what is to be cut is cut: what ``update`` is given is then run as it is.
    """

    tree: Any
    paths: tuple[Any, ...]
    row: Any = None
    settled: bool = False


class CannotCutError(ValueError):
    """Raised by a transformation that cannot be run on slices of a leaf along its first axis."""


def places_in(whole: Whole | None, updates: Any) -> list[int]:
    """The places of the leaves of ``updates`` among those of the whole tree."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(updates)]
    places = {path: i for i, path in enumerate(paths if whole is None else whole.paths)}
    return [places[path] for path in paths]


def key_of_leaf(key: jax.Array, place: int, whole: Whole | None) -> jax.Array:
    """The key of a leaf by its place in the whole tree, and of each slice of it."""
    return key_of_slice(jax.random.fold_in(key, place), whole)


def key_of_slice(key: jax.Array, whole: Whole | None) -> jax.Array:
    """A key of a slice's own; the key itself for a whole leaf."""
    return key if whole is None or whole.row is None else jax.random.fold_in(key, whole.row)
