"""Which layers of a model an adapter is attached to."""

from collections.abc import Mapping
from typing import Any

from lowrank_optax.matrices.rules import is_weight
from lowrank_optax.matrices.selection import Path, Where, matching, near, path_string


def chosen(layers: Mapping[Path, Any], by_default: set[Path], where: Where) -> list[Path]:
    """The paths of the layers that are meant, in their order.

    Args:
      layers: All layers that an adapter could be attached to, by path.
      by_default: Those meant where ``where`` is None, less those with the name of a head.
      where: Which are.

    Raises:
      ValueError: If none is, with the nearest paths; or the pattern is no regular expression.
      TypeError: If ``where`` is none of what it may be.
    """
    if where is not None:
        return matching("where", layers, where, "layer that an adapter could be attached to")
    is_meant = lambda path: is_weight(f"{path_string(path)}/kernel")
    found = [path for path in layers if path in by_default and is_meant(path)]
    if not found:
        known = near(layers, "")
        raise ValueError(f"where=None finds no linear layer except heads and embeddings; {known}")
    return found
