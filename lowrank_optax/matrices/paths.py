"""Names of leaves: the same name for the same parameter, whatever tree it is met in."""

from collections.abc import Container
import re
from typing import Any

import jax
import optax


def normalised_path(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Key path as a tuple of plain names, without the ``.value`` that a Flax Variable appends.

    Only the attribute is dropped: a parameter may itself be called ``value``, a dictionary's key.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def path_string(path: tuple[Any, ...]) -> str:
    """Key path as ``layers/attention/query/kernel``."""
    return "/".join(normalised_path(path))


def leaves_by_path(tree: Any) -> dict[Any, Any]:
    """The leaves of a tree by their key paths."""
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def is_whole(tree: Any) -> bool:
    """Whether a tree has leaves, and is not a part of another, with ``optax.MaskedNode`` in it.

    What selects leaves must find some in a whole tree; in a part, as of ``optax.partition``, there
    may be none.
    """
    is_hole = lambda x: isinstance(x, optax.MaskedNode)
    leaves = jax.tree.leaves(tree, is_leaf=is_hole)
    return bool(leaves) and not any(map(is_hole, leaves))


def compiled_pattern(argument: str, pattern: str) -> re.Pattern[str]:
    """The regular expression; raises ValueError, which names the argument, where it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}={pattern!r} is no regular expression: {error}.") from error


def owner_of(path: Any, parameters: Container[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The parameter an array of a state belongs to: the longest one whose path ends the array's.

    Args:
      path: The array's path.
      parameters: Normalised paths of the parameters.
    """
    names = normalised_path(path)
    endings = (names[start:] for start in range(len(names) + 1))
    return next((ending for ending in endings if ending in parameters), None)
