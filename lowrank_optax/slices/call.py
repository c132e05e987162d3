"""One call of ``update``, taken apart: which arrays of it belong to which leaf."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.slices.whole import Whole

Path = Any


class Call(NamedTuple):
    """What ``tx.update`` is called with.

    Attributes:
      tx: The transformation.
      treedef: The tree of gradients.
      paths: Path of each leaf.
      gradients: The leaves.
      likes: For each leaf its parameter, an array or a tree of arrays; the gradients themselves if
        ``update`` is given no parameters.
      has_params: Whether it is.
      state: The arrays of the state by their paths.
      whole: The tree of which this may be a part.
      extra_args: Passed on.
    """

    tx: optax.GradientTransformationExtraArgs
    treedef: jax.tree_util.PyTreeDef
    paths: Sequence[Path]
    gradients: Sequence[Any]
    likes: Sequence[Any]
    has_params: bool
    state: dict[Path, Any]
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
        likes = gradients if params is None else treedef.flatten_up_to(params)
        if whole is None:
            shapes = jax.tree.map(_shape_of, updates if params is None else params)
            whole = Whole(shapes, tuple(path for path, _ in with_paths))
        return cls(
            tx,
            treedef,
            [path for path, _ in with_paths],
            gradients,
            likes,
            params is not None,
            dict(jax.tree_util.tree_leaves_with_path(state)),
            whole,
            extra_args,
        )

    def tree(self, leaves: Mapping[int, Any]) -> Any:
        """The tree with these leaves alone, and ``MaskedNode`` in the place of the others."""
        count = len(self.gradients)
        return self.treedef.unflatten([leaves.get(i, optax.MaskedNode()) for i in range(count)])

    def init_shapes(self, leaves: Sequence[int], likes: Sequence[Any]) -> Any:
        """The shapes of the state for these leaves alone."""
        return jax.eval_shape(self.tx.init, self.tree(dict(zip(leaves, likes, strict=True))))

    def state_shapes(self, leaves: Sequence[int]) -> Any:
        """The shapes of the state for these leaves alone, whole."""
        return self.init_shapes(leaves, [self.likes[i] for i in leaves])

    def shared(self) -> set[Path]:
        """Paths of the arrays of the state that belong to no leaf: step counts, a seed for all."""
        return {path for path, _ in jax.tree_util.tree_leaves_with_path(self.state_shapes([]))}

    def update(
        self,
        leaves: Sequence[int],
        gradients: Sequence[Any],
        likes: Sequence[Any],
        own: Mapping[Path, Any],
        whole: Whole,
    ) -> tuple[list[Any], dict[Path, Any]]:
        """``tx.update`` of some leaves alone, or of slices of them.

        Args:
          leaves: Indices of the leaves.
          gradients: Theirs.
          likes: Their parameters.
          own: Arrays of their state that replace those of the call.
          whole: The tree they belong to.

        Returns:
          Their updates, each an array or a tree of arrays; and the new state by its paths.
        """
        params = self.tree(dict(zip(leaves, likes, strict=True)))
        shapes, structure = jax.tree_util.tree_flatten_with_path(self.state_shapes(leaves))
        state = structure.unflatten([own.get(path, self.state[path]) for path, _ in shapes])
        updates, state = self.tx.update(
            self.tree(dict(zip(leaves, gradients, strict=True))),
            state,
            params if self.has_params else None,
            whole=whole,
            **self.extra_args,
        )
        parts = self.treedef.flatten_up_to(updates)
        return [parts[i] for i in leaves], dict(jax.tree_util.tree_leaves_with_path(state))


def grown(like: Any) -> Any:
    """The shapes of a leaf's arrays with twice the rows."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype), like
    )


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype)
