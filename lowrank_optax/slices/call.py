"""A call of ``update`` or a part of it: some of its leaves, or some rows of one."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
import warnings
import zlib

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices.paths import leaves_by_path, path_string

Path = Any


class Whole(NamedTuple):
    """The extra argument ``whole`` of ``update``: the tree of which it is given a part.

    Transformations that look at nothing but the arrays they are given need none of it. One that
    goes by the shape of a leaf, or by random numbers, finds here what it is in the whole tree.

    Attributes:
      tree: The whole tree, for its shapes and dtypes alone: of the parameters, or of the gradients
        where ``update`` is given no parameters. None if all that is given is whole.
      rows: Which rows of the leaves' first axis are given, int32 ``[rows]``; None for all.
      run: Number of rows of a slice that follow one another in the leaf; zero for whole leaves.
      settled: Whether ``update`` must not cut any further.
      layer: Which layer of a stack is given, as a leaf of its own, for random numbers; None if
        leaves are not layers.
    """

    tree: Any = None
    rows: Any = None
    run: int = 0
    settled: bool = False
    layer: Any = None


class CannotCutError(ValueError):
    """Raised by a transformation that cannot be run on slices of a leaf along its first axis."""


class Call(NamedTuple):
    """What ``tx.update`` is called with.

    Attributes:
      tx: The transformation.
      treedef: The tree of gradients.
      paths: Path of each leaf.
      gradients: The leaves.
      params: For each leaf its parameter, an array or a tree of arrays; the gradients themselves if
        ``update`` is given no parameters.
      has_params: Whether it is.
      state: The arrays of the state by their paths.
      flags: Those of them that say whether a leaf had a NaN, for `optax.zero_nans`: of a slice,
        whether it had one.
      whole: The tree of which this may be a part.
      extra_args: Keyword arguments that are passed on.
    """

    tx: optax.GradientTransformationExtraArgs
    treedef: jax.tree_util.PyTreeDef
    paths: Sequence[Path]
    gradients: Sequence[Any]
    params: Sequence[Any]
    has_params: bool
    state: dict[Path, Any]
    flags: frozenset[Path]
    whole: Whole
    extra_args: dict[str, Any]

    @classmethod
    def of(
        cls,
        tx: optax.GradientTransformationExtraArgs,
        updates: Any,
        state: Any,
        params: Any,
        whole: Whole | None,
        extra_args: dict[str, Any],
    ) -> "Call":
        with_paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
        gradients = [x for _, x in with_paths]
        tree = whole_of(whole, updates if params is None else params)
        return cls(
            tx,
            treedef,
            [path for path, _ in with_paths],
            gradients,
            gradients if params is None else treedef.flatten_up_to(params),
            params is not None,
            leaves_by_path(state),
            _flags(state),
            (whole or Whole())._replace(tree=tree),
            extra_args,
        )

    def tree(self, leaves: Mapping[int, Any]) -> Any:
        """The tree with these leaves alone, and ``MaskedNode`` instead of the others."""
        count = len(self.gradients)
        return self.treedef.unflatten([leaves.get(i, optax.MaskedNode()) for i in range(count)])

    def state_shapes(self, leaves: Sequence[int], params: Sequence[Any] | None = None) -> Any:
        """The shapes of the state for these leaves alone, or for others with their structure."""
        params = [self.params[i] for i in leaves] if params is None else params
        return shapes_of_state(self.tx, self.tree(dict(zip(leaves, params, strict=True))))

    def shared(self) -> set[Path]:
        """Paths of the arrays of the state that belong to no leaf: step counts, a seed for all."""
        return set(leaves_by_path(self.state_shapes([])))

    def update(
        self,
        leaves: Sequence[int],
        gradients: Sequence[Any],
        params: Sequence[Any],
        own: Mapping[Path, Any],
        whole: Whole,
    ) -> tuple[list[Any], dict[Path, Any]]:
        """``tx.update`` of some leaves alone, or of slices of them.

        Args:
          leaves: Indices of the leaves.
          gradients: Their gradients.
          params: Their parameters.
          own: Arrays of their state that replace those of the call.
          whole: The tree they belong to.

        Returns:
          Their updates, each an array or a tree of arrays; and the new state by its paths.
        """
        shapes, structure = jax.tree_util.tree_flatten_with_path(self.state_shapes(leaves))
        part = self.tree(dict(zip(leaves, params, strict=True))) if self.has_params else None
        updates, state = self.tx.update(
            self.tree(dict(zip(leaves, gradients, strict=True))),
            structure.unflatten([own.get(path, self.state[path]) for path, _ in shapes]),
            part,
            whole=whole,
            **self.extra_args,
        )
        if jax.tree.structure(state) != structure:
            raise CannotCutError("the state changes its structure at this step.")
        parts = self.treedef.flatten_up_to(updates)
        return [parts[i] for i in leaves], leaves_by_path(state)

    def without(self, cut: set[int]) -> tuple[dict[int, Any], dict[Path, Any]]:
        """`update` of all leaves but these: updates by index, and the new state by its paths."""
        left = [i for i in range(len(self.gradients)) if i not in cut]
        of = lambda leaves: [leaves[i] for i in left]
        updates, state = self.update(left, of(self.gradients), of(self.params), {}, self.whole)
        return dict(zip(left, updates, strict=True)), state

    def slice_of(
        self,
        index: int,
        arrays: tuple[Any, Any, Sequence[Any]],
        own: Sequence[Path],
        rows: jax.Array,
        run: int,
    ) -> tuple[Any, dict[Path, Any]]:
        """`update` of a slice of a leaf.

        Args:
          index: Index of the leaf.
          arrays: The slices of its gradient, of its parameter, and of its own state's arrays.
          own: The paths of these.
          rows: Which rows of the leaf these are.
          run: Number of them that follow one another.
        """
        gradient, param, states = arrays
        whole = self.whole._replace(rows=rows, run=run, settled=True)
        of_state = dict(zip(own, states, strict=True))
        updates, state = self.update([index], [gradient], [param], of_state, whole)
        return updates[0], state


def _flags(state: Any) -> frozenset[Path]:
    is_zero_nans = lambda x: isinstance(x, optax.ZeroNansState)
    nodes = jax.tree.leaves_with_path(state, is_leaf=is_zero_nans)
    return frozenset(
        (*path, *of_leaf)
        for path, node in nodes
        if is_zero_nans(node)
        for of_leaf, x in jax.tree.leaves_with_path(node)
        if jnp.shape(x) == ()
    )


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
      key: PRNG key of this step.
      path: Path of the leaf.
      x: The leaf, or its slice.
      whole: Where its rows are in the leaf.
    """
    key = jax.random.fold_in(key, zlib.crc32(path_string(path).encode()))
    if whole is not None and whole.layer is not None:
        key = jax.random.fold_in(key, whole.layer)
    if x.ndim == 0:
        return key
    rows = None if whole is None else whole.rows
    if rows is None:
        rows = jnp.arange(x.shape[0], dtype=jnp.int32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
