"""Names of leaves: the same name for the same parameter, whatever tree it is met in."""

from typing import Any

import jax


def normalised_path(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Key path as a tuple of plain names, without the ``value`` that an NNX Variable appends."""
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    return names[:-1] if names and names[-1] == "value" else names


def path_string(path: tuple[Any, ...]) -> str:
    """Key path as ``layers/attention/query/kernel``."""
    return "/".join(normalised_path(path))
