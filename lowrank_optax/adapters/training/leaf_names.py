"""Leaves of a tree that are chosen by the last names of their paths."""

from collections.abc import Callable, Collection
from typing import Any

import jax

from lowrank_optax.matrices.paths import is_whole, normalised_path


def are_named(tree: Any, names: Collection[str]) -> Any:
    """Which leaves of a tree have one of these last names: a tree of bools.

    Example:
      >>> are_named({"up": {"A": 1, "gate": 2}}, ("gate",))
      {'up': {'A': False, 'gate': True}}
    """
    endings = {(name,) for name in names}
    one = lambda path, _: normalised_path(path)[-1:] in endings
    return jax.tree_util.tree_map_with_path(one, tree)


def all_but(names: Collection[str]) -> Callable[[Any], Any]:
    """A mask for ``optax.masked``: which leaves of a tree have none of these last names."""
    return lambda tree: jax.tree.map(lambda is_named: not is_named, are_named(tree, names))


def check_any_named(params: Any, names: Collection[str], advice: str) -> None:
    """Raises ValueError if no leaf has one of these last names.

    Args:
      params: Parameters; a part of a tree, as of ``optax.partition``, may have no such leaf.
      names: The names.
      advice: What to do, the end of the message.
    """
    if is_whole(params) and not any(jax.tree.leaves(are_named(params, names))):
        raise ValueError(f"no parameter is named {' or '.join(map(repr, names))}: {advice}")
