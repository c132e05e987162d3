"""How the inner optimizer is run: on the whole projected tree, or on each leaf alone.

Where moments are reset or rotated, they must be found in the inner state of one leaf, and a reset
must restart the count of that matrix alone. So the inner optimizer is then made for single matrices
and mapped over leaves and their batch axes; its state is kept as that of one matrix with a tree in
the place of each array.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.projection.leaf import Parts
from lowrank_optax.projection.moments import init_one, update_one
from lowrank_optax.projection.records import gather, spread
from lowrank_optax.projection.view import LeafView


class InnerRunner(NamedTuple):
    """The inner optimizer, and that of other leaves, for one tree.

    Attributes:
      parts: What the projected optimizer is made of.
      other: The transformation of leaves that are not matrices; the inner one if None.
      treedef: The tree.
      views: How each leaf is projected.
      leaves: The gradients, or anything with the shapes of those that are not matrices.
    """

    parts: Parts
    other: optax.GradientTransformationExtraArgs | None
    treedef: jax.tree_util.PyTreeDef
    views: Sequence[LeafView | None]
    leaves: Sequence[Any]

    def init(self, zeros: Sequence[jax.Array]) -> tuple[Any, Any]:
        """The states of both, for zeros like the projected gradients."""
        others = () if self.other is None else self.other.init(self._rest(zeros))
        if not self.parts.each_alone:
            return self.parts.inner.init(self._mine(zeros)), others
        each = [
            init_one(self.parts.inner, x, self._batch_ndim(i)) if self._is_mine(i) else None
            for i, x in enumerate(zeros)
        ]
        return spread(self.treedef, each, self._structure()), others

    def split(self, state: Any) -> list[Any]:
        """The inner state of each leaf; None for all where there is one for the tree.

        And None for leaves that the other transformation handles.
        """
        if not self.parts.each_alone:
            return [None] * len(self.views)
        each = gather(self.treedef, state, self._structure())
        return [x if self._is_mine(i) else None for i, x in enumerate(each)]

    def join(self, each: Sequence[Any], state: Any) -> Any:
        """The inverse of `split`."""
        return spread(self.treedef, each, self._structure()) if self.parts.each_alone else state

    def update(
        self,
        gradients: Sequence[jax.Array],
        each: Sequence[Any],
        state: Any,
        others_state: Any,
        params: Sequence[jax.Array] | None,
        extra_args: dict[str, Any],
    ) -> tuple[list[Any], Any, Any]:
        """The answers to projected gradients (and to other leaves'), and the new states."""
        mine, rest = (None, None) if params is None else (self._mine(params), self._rest(params))
        answers = [None] * len(self.views)
        if self.other is not None:
            updates, others_state = self.other.update(
                self._rest(gradients), others_state, rest, **extra_args
            )
            answers = self.treedef.flatten_up_to(updates)
        if self.parts.each_alone:
            own, state = self._update_each(gradients, each, params, extra_args)
        else:
            updates, state = self.parts.inner.update(
                self._mine(gradients), state, mine, **extra_args
            )
            own = self.treedef.flatten_up_to(updates)
        merged = [own[i] if self._is_mine(i) else answers[i] for i in range(len(self.views))]
        return merged, state, others_state

    def _update_each(
        self,
        gradients: Sequence[jax.Array],
        each: Sequence[Any],
        params: Sequence[jax.Array] | None,
        extra_args: dict[str, Any],
    ) -> tuple[list[Any], Any]:
        answers: list[Any] = [None] * len(self.views)
        states: list[Any] = [None] * len(self.views)
        for i, gradient in enumerate(gradients):
            if self._is_mine(i):
                param = None if params is None else params[i]
                answers[i], states[i] = update_one(
                    self.parts.inner, gradient, each[i], param, self._batch_ndim(i), extra_args
                )
        return answers, spread(self.treedef, states, self._structure())

    def _is_mine(self, i: int) -> bool:
        return self.other is None or self.views[i] is not None

    def _mine(self, xs: Sequence[Any]) -> Any:
        """The tree of what the inner optimizer handles."""
        kept = [x if self._is_mine(i) else optax.MaskedNode() for i, x in enumerate(xs)]
        return self.treedef.unflatten(kept)

    def _rest(self, xs: Sequence[Any]) -> Any:
        """The tree of what the other transformation handles."""
        kept = [optax.MaskedNode() if self._is_mine(i) else x for i, x in enumerate(xs)]
        return self.treedef.unflatten(kept)

    def _batch_ndim(self, i: int) -> int:
        view = self.views[i]
        return 0 if view is None else len(view.view.batch)

    def _structure(self) -> jax.tree_util.PyTreeDef:
        """The structure of the inner state of one leaf."""
        first = next((i for i in range(len(self.views)) if self._is_mine(i)), None)
        shape: tuple[int, ...] = (1, 1)
        if first is not None:
            view = self.views[first]
            shape = self.leaves[first].shape if view is None else view.view.projected_shape[-2:]
        example = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.tree.structure(jax.eval_shape(self.parts.inner.init, example))
