"""Names of leaves: the same name for the same parameter, whatever tree it is met in."""

from typing import Any

import jax


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
