"""Which leaves of a parameter tree are reparameterised or pruned."""

from collections.abc import Callable
import re
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import (
    DimensionNumbersRule,
    WeightDimensionNumbers,
    resolve_dimension_numbers,
)
from lowrank_optax.matrices.names import named_kind
from lowrank_optax.matrices.paths import is_whole, normalised_path, path_string
from lowrank_optax.matrices.rules import default_rule
from lowrank_optax.matrices.selection import check_patterns

Where: TypeAlias = str | Callable[[str, tuple[int, ...]], bool] | None
"""Leaves by a regular expression that is found in their path (``re.search``), by a function of path
and shape, or (None) all matrices and convolutions, output layers included."""


def selected(params: Any, where: Where, rule: DimensionNumbersRule = None) -> list[bool]:
    """Whether each leaf is one of them, in the order of ``jax.tree.leaves``.

    Only leaves of real numbers are. For None, matrices are those of the rule.

    Raises:
      ValueError: If ``where`` is no regular expression, or selects no leaf of a whole tree.
      TypeError: If it is none of the kinds allowed.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for _, leaf in leaves]
    must_find = is_whole(params)
    if where is None:
        chosen = [spec is not None for spec in layer_matrices(params, rule)]
    elif isinstance(where, str):
        paths = [normalised_path(path) for path, _ in leaves]
        if must_find:
            check_patterns("where", [where], paths, "leaf")
        chosen = [bool(re.search(where, "/".join(path))) for path in paths]
    elif callable(where):
        chosen = [bool(where(path_string(path), tuple(leaf.shape))) for path, leaf in leaves]
    else:
        raise TypeError(
            f"where={where!r} must be a regular expression, a function of path and shape, or None."
        )
    both = [a and b for a, b in zip(chosen, floating, strict=True)]
    if must_find and not any(both):
        named = ", ".join(path_string(path) for path, _ in leaves[:5])
        raise ValueError(
            f"where={where!r} selects none of the {len(leaves)} leaves ({named}): give a pattern "
            "or a function that selects some of real numbers."
        )
    return both


def layer_matrices(
    params: Any, rule: DimensionNumbersRule = None
) -> list[WeightDimensionNumbers | None]:
    """How each leaf is a batch of matrices; None for one that is not. By default, by names."""
    if rule is None:
        # Output layers are layers here; other methods leave them out.
        rule = lambda tree: default_rule(tree, lambda path: named_kind(path) in (None, "head"))
    return resolve_dimension_numbers(rule, params)


def map_selected(function: Callable[..., Any], where: Where, params: Any, *others: Any) -> Any:
    """``params`` with the function of each selected leaf, and of those of the other trees there."""
    leaves, treedef = jax.tree.flatten(params)
    rest = [treedef.flatten_up_to(other) for other in others]
    return treedef.unflatten(
        [
            function(leaf, *more) if chosen else leaf
            for chosen, leaf, *more in zip(selected(params, where), leaves, *rest, strict=True)
        ]
    )
