"""One call of ``update``, taken apart: which arrays of it belong to which leaf."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from lowrank_optax.matrices.paths import leaves_by_path
from lowrank_optax.slices.whole import CannotCutError, Whole, shapes_of_state, whole_of

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
        tree = whole_of(whole, updates if params is None else params)
        return cls(
            tx,
            treedef,
            [path for path, _ in with_paths],
            gradients,
            likes,
            params is not None,
            leaves_by_path(state),
            Whole(tree) if whole is None else whole._replace(tree=tree),
            extra_args,
        )

    def is_traced(self) -> bool:
        """Whether this is a call under a transformation of JAX, such as jit."""
        arrays = jax.tree.leaves((self.gradients, self.likes, list(self.state.values())))
        return any(isinstance(x, jax.core.Tracer) for x in arrays)

    def tree(self, leaves: Mapping[int, Any]) -> Any:
        """The tree with these leaves alone, and ``MaskedNode`` in the place of the others."""
        count = len(self.gradients)
        return self.treedef.unflatten([leaves.get(i, optax.MaskedNode()) for i in range(count)])

    def init_shapes(self, leaves: Sequence[int], likes: Sequence[Any]) -> Any:
        """The shapes of the state for these leaves alone."""
        return shapes_of_state(self.tx, self.tree(dict(zip(leaves, likes, strict=True))))

    def state_shapes(self, leaves: Sequence[int]) -> Any:
        """The shapes of the state for these leaves alone, whole."""
        return self.init_shapes(leaves, [self.likes[i] for i in leaves])

    def shared(self) -> set[Path]:
        """Paths of the arrays of the state that belong to no leaf: step counts, a seed for all."""
        return set(leaves_by_path(self.state_shapes([])))

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
        if jax.tree.structure(state) != structure:
            raise CannotCutError("the state changes its structure at this step.")
        parts = self.treedef.flatten_up_to(updates)
        return [parts[i] for i in leaves], leaves_by_path(state)

    def without(self, cut: set[int]) -> tuple[dict[int, Any], dict[Path, Any]]:
        """As `update`, of all leaves but these, whose updates come by their places."""
        rest = [i for i in range(len(self.gradients)) if i not in cut]
        pick = lambda leaves: [leaves[i] for i in rest]
        updates, state = self.update(rest, pick(self.gradients), pick(self.likes), {}, self.whole)
        return dict(zip(rest, updates, strict=True)), state

    def slice_of(
        self,
        place: int,
        arrays: tuple[Any, Any, Sequence[Any]],
        own: Sequence[Path],
        rows: jax.Array,
        run: int,
    ) -> tuple[Any, dict[Path, Any]]:
        """``tx.update`` of a slice of a leaf.

        Args:
          place: Index of the leaf.
          arrays: The slices of its gradient, of its parameter, and of its own state's arrays.
          own: The paths of these.
          rows: Which rows of the leaf these are.
          run: So many of them follow one another.

        Returns:
          As `update`, of this leaf.
        """
        gradient, like, states = arrays
        whole = self.whole._replace(rows=rows, run=run, settled=True)
        state = dict(zip(own, states, strict=True))
        updates, state = self.update([place], [gradient], [like], state, whole)
        return updates[0], state


def grown(like: Any) -> Any:
    """The shapes of a leaf's arrays with twice the rows."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype), like
    )
