"""What a transformation is told that is given a part of a tree: the extra argument ``whole``."""

from typing import Any, NamedTuple
import warnings
import zlib

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices.paths import path_string


class Whole(NamedTuple):
    """The tree of which ``update`` is given a part.

    Transformations that look at nothing but the arrays they are given need none of it. One that
    goes by the shape of a leaf, or by random numbers, finds here what it is in the whole tree.

    Attributes:
      tree: The whole tree, for its shapes and dtypes alone: of the parameters, or of the gradients
        where ``update`` is given no parameters. None if all that is given is whole.
      rows: Of slices of leaves along their first axis, which rows these are, int32 ``[rows]``; None
        for whole leaves.
      run: So many rows of a slice, a part of it, follow one another in the leaf; zero for whole
        leaves.
      settled: Whether what is to be cut is cut: what ``update`` is given is then run as it is.
    """

    tree: Any = None
    rows: Any = None
    run: int = 0
    settled: bool = False


class CannotCutError(ValueError):
    """Raised by a transformation that cannot be run on slices of a leaf along its first axis."""


def whole_of(whole: Whole | None, tree: Any) -> Any:
    """The tree of which this is a part, or itself."""
    return tree if whole is None or whole.tree is None else whole.tree


def shapes_of_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """The shapes of ``tx.init(params)``, of a tree or a part of one, without its warnings.

    `init` has warned of the whole tree; a part may well have nothing that can be selected.
    """
    with warnings.catch_warnings(action="ignore"):
        return jax.eval_shape(tx.init, params)


def keys_of_rows(key: jax.Array, path: Any, x: jax.Array, whole: Whole | None) -> jax.Array:
    """A key for each row of a leaf, or of a slice of it: the same however leaves are cut.

    Args:
      key: Of this step.
      path: Of the leaf.
      x: The leaf, or its slice.
      whole: Where its rows are in the leaf.
    """
    key = jax.random.fold_in(key, zlib.crc32(path_string(path).encode()))
    if x.ndim == 0:
        return key
    rows = None if whole is None else whole.rows
    if rows is None:
        rows = jnp.arange(x.shape[0], dtype=jnp.int32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
