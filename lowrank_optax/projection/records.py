"""Records of trees from a record for each leaf, and back: state as parallel trees."""

from collections.abc import Sequence
from typing import Any

import jax
import optax


def spread(
    treedef: jax.tree_util.PyTreeDef, values: Sequence[Any], structure: jax.tree_util.PyTreeDef
) -> Any:
    """One record of trees from a record for each leaf; ``MaskedNode`` where a leaf has None.

    nnx.Optimizer keeps an array in the place of a parameter, not a record.

    Raises:
      ValueError: If the records differ in structure.
    """
    for value in values:
        if value is not None and jax.tree.structure(value) != structure:
            raise ValueError(
                "the inner optimizer's state differs from leaf to leaf, so it can not be reset or "
                "rotated leaf by leaf; give others=, a transformation of its own for leaves that "
                f"are no matrices. The states: {structure} and {jax.tree.structure(value)}."
            )
    rows = [
        [optax.MaskedNode()] * structure.num_leaves if v is None else jax.tree.leaves(v)
        for v in values
    ]
    columns = zip(*rows, strict=True) if rows else [()] * structure.num_leaves
    return structure.unflatten([treedef.unflatten(column) for column in columns])


def gather(
    treedef: jax.tree_util.PyTreeDef, trees: Any, structure: jax.tree_util.PyTreeDef
) -> list[Any]:
    """The inverse of `spread`: a record for each leaf, of ``MaskedNode`` where it had none."""
    columns = [treedef.flatten_up_to(tree) for tree in structure.flatten_up_to(trees)]
    rows = zip(*columns, strict=True) if columns else [()] * treedef.num_leaves
    return [structure.unflatten(row) for row in rows]
