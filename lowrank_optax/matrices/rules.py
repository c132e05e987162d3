"""Which leaves of a parameter tree are matrices: rules, and how they are matched to the leaves."""

from collections.abc import Callable
import re
from typing import Any, TypeAlias

import jax
import optax

from lowrank_optax.matrices.paths import normalised_path, path_string
from lowrank_optax.matrices.views import (
    WeightDimensionNumbers,
    is_dimension_numbers,
    matrix_shape,
)

DimensionNumbersRule: TypeAlias = WeightDimensionNumbers | Callable[[Any], Any] | Any | None
"""One spec for all leaves, a tree of specs (prefixes, None and MaskedNode allowed), or a callable
that makes either from the parameters; None stands for the rule by names, `default_rule`."""

NOT_MATRICES = re.compile(
    r"(embed|norm|(^|[/_])(bias|scale|(lm_|output_)?head|logits|classifier)([/_\d]|$))", re.I
)
"""Paths of leaves that are no matrices by default: embeddings, norms, biases, output heads."""


def default_rule(params: Any, include: str | None = None) -> Any:
    """Dimension numbers by names alone: leaves of two axes, but for `NOT_MATRICES`."""
    def spec(path: Any, leaf: Any) -> WeightDimensionNumbers | None:
        name = path_string(path)
        wanted = not NOT_MATRICES.search(name) or (include and re.search(include, name))
        return WeightDimensionNumbers(0, 1) if leaf.ndim == 2 and wanted else None

    return jax.tree_util.tree_map_with_path(spec, params)


def _is_rule_leaf(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode) or is_dimension_numbers(x)


def resolve_dimension_numbers(
    rule: DimensionNumbersRule, params: Any
) -> list[WeightDimensionNumbers | None]:
    """The dimension numbers of each leaf of ``params``, in the order of ``jax.tree.leaves``.

    A tree of specs is matched by paths, not by tree structure: the tree that an NNX model gives
    before an update (with Variables) and the one inside the update (without) both find their spec,
    and so does a subset of the parameters, or one with ``MaskedNode`` holes.

    Args:
      rule: A spec for every leaf that has at least two axes; a tree of specs, in which a spec (or
        None, "not a matrix") may stand for a whole subtree; a callable of ``params`` that gives
        either; or None for the rule by names, `default_rule`.
      params: Any tree of arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      A list with a spec, or None for "not a matrix", for each leaf.

    Raises:
      ValueError: If a tree of specs says nothing of a leaf, or a spec does not fit its leaf.
      TypeError: If the rule is none of the above.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
      >>> resolve_dimension_numbers(None, params)
      [None, WeightDimensionNumbers(reduction_axis=0, output_axis=1)]

    Reference:
      The three forms are those of ``optax.contrib.muon``: https://optax.readthedocs.io
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if rule is None:
        rule = default_rule
    if callable(rule) and not is_dimension_numbers(rule):
        rule = rule(params)
    if is_dimension_numbers(rule):
        specs = [rule if leaf.ndim >= 2 else None for _, leaf in leaves]
    else:
        specs = _match_by_path(rule, [path for path, _ in leaves])
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        if spec is not None:
            matrix_shape(leaf.shape, spec, path_string(path))
    return specs


def _match_by_path(rule: Any, paths: list[Any]) -> list[WeightDimensionNumbers | None]:
    entries = jax.tree_util.tree_leaves_with_path(rule, is_leaf=_is_rule_leaf)
    for path, entry in entries:
        if not _is_rule_leaf(entry):
            raise TypeError(
                f"weight_dimension_numbers holds {entry!r} at {path_string(path)!r}; it takes "
                "WeightDimensionNumbers (or optax's), None, or a tree or callable of these."
            )
    table = {normalised_path(path): entry for path, entry in entries}
    specs = []
    for path in paths:
        names = normalised_path(path)
        prefix = next((names[:n] for n in range(len(names), -1, -1) if names[:n] in table), None)
        if prefix is None:
            raise ValueError(
                f"weight_dimension_numbers says nothing of the parameter {path_string(path)!r}; "
                "give it dimension numbers, or None if it is not a matrix."
            )
        found = table[prefix]
        specs.append(None if isinstance(found, optax.MaskedNode) else found)
    return specs
