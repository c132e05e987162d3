"""The state of an optimizer for a model whose parameters have changed, from the state before."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from lowrank_optax.matrices.paths import normalised_path

Fit: TypeAlias = Callable[[Any, tuple[str, ...], Any, Any], Any]
"""``fit(path, names, new, old)`` returns what becomes of one array of the new state; ``names`` is
its normalised path, and ``old`` the array of that path in the old state, or None."""


def carry(new_state: Any, old_state: Any, fit: Fit) -> Any:
    """The arrays that ``fit`` makes of those of two states, in the structure of the new one."""
    old = {normalised_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(old_state)}

    def carried(path: Any, leaf: Any) -> Any:
        names = normalised_path(path)
        return fit(path, names, leaf, old.get(names))

    return jax.tree_util.tree_map_with_path(carried, new_state)
