"""Updates slice by slice: what an optimizer needs at its peak is one layer, not a stack of them.

A transformation works on whole leaves, and a leaf is often a stack of all layers. Whatever it makes
of one besides its results (moments decoded, answers lifted, bfloat16 in float32) then has the size
of all layers. Here leaves that are large are cut along their first axis, into runs of layers or of
an embedding's rows, and the same transformation runs on one slice after another, in a loop that
writes updates over gradients, and the state over itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.slices.call import Call
from lowrank_optax.slices.loop import run
from lowrank_optax.slices.plan import Budget, SlicedLeaf, sliced_leaves
from lowrank_optax.slices.whole import CannotCutError, Whole

Chosen = Callable[[Call], Sequence[bool]]


def update_in_slices(
    tx: optax.GradientTransformationExtraArgs,
    chosen: Chosen,
    parts: Sequence[optax.GradientTransformation],
) -> Callable[..., tuple[Any, Any]]:
    """``tx.update`` that runs large leaves slice by slice, where it gives the same.

    Args:
      tx: A transformation that takes the extra argument ``whole``.
      chosen: For each leaf of a call whether slices are worth the while.
      parts: Transformations that ``tx`` was given, of which it depends whether its leaves, and
        their slices, are independent.
    """

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        whole: Whole | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        if whole is None or not whole.settled:
            call = Call.of(tx, updates, state, params, whole, extra_args)
            try:
                leaves = sliced_leaves(call, Budget(), chosen, parts)
            except CannotCutError:
                leaves = []
            if leaves:
                return updated(call, leaves, state)
        return tx.update(updates, state, params, whole=whole, **extra_args)

    return update


def updated(call: Call, leaves: Sequence[SlicedLeaf], state: Any) -> tuple[Any, Any]:
    """The updates, in the memory of the gradients where they fit there, and the new state."""
    new, state = _each(call, leaves, state, _in_place_of_gradient)
    return call.treedef.unflatten(new), state


def applied(call: Call, leaves: Sequence[SlicedLeaf], state: Any) -> tuple[Any, Any]:
    """The new parameters, in the memory of the old ones, and the new state."""
    new, state = _each(call, leaves, state, _in_place_of_param)
    cut = {leaf.place for leaf in leaves}
    params = [x if i in cut else optax.apply_updates(call.likes[i], x) for i, x in enumerate(new)]
    return call.treedef.unflatten(params), state


def _each(
    call: Call, leaves: Sequence[SlicedLeaf], state: Any, in_place: Callable[..., Any]
) -> tuple[list[Any], Any]:
    """The result for each leaf, and the new state."""
    results, arrays = call.without({leaf.place for leaf in leaves})
    for leaf in leaves:
        results[leaf.place], own = in_place(call, leaf)
        arrays |= dict(zip(leaf.own, own, strict=True))
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    state = structure.unflatten([arrays[path] for path, _ in paths])
    return [results[i] for i in range(len(results))], state


def _in_place_of_gradient(call: Call, leaf: SlicedLeaf) -> tuple[Any, list[Any]]:
    gradient, like = call.gradients[leaf.place], call.likes[leaf.place]
    fits = _fits(gradient, leaf.emitted)

    def step(carried: Any, read: Any, row: jax.Array) -> Any:
        (buffer, own), (gradient, like) = carried, read
        gradient = buffer if fits else gradient
        return _updated(call, leaf, gradient, like if call.has_params else gradient, own, row)

    carried = gradient if fits else _room(leaf, gradient), [call.state[path] for path in leaf.own]
    read = None if fits else gradient, like if call.has_params else None
    return run(step, carried, read, leaf.cut)


def _in_place_of_param(call: Call, leaf: SlicedLeaf) -> tuple[Any, list[Any]]:
    def step(carried: Any, gradient: Any, row: jax.Array) -> Any:
        param, own = carried
        update, own = _updated(call, leaf, gradient, param, own, row)
        return optax.apply_updates(param, update), own

    carried = call.likes[leaf.place], [call.state[path] for path in leaf.own]
    return run(step, carried, call.gradients[leaf.place], leaf.cut)


def _updated(
    call: Call, leaf: SlicedLeaf, gradient: Any, like: Any, own: Any, row: jax.Array
) -> tuple[Any, list[Any]]:
    """The update of a slice, and its own new state."""
    cut, rows = leaf.cut, gradient.shape[0]
    arrays, numbers = (gradient, like, own), cut.rows_from(row, rows)
    update, state = call.slice_of(leaf.place, arrays, leaf.own, numbers, rows // cut.shards)
    return update, [state[path] for path in leaf.own]


def _fits(gradient: Any, emitted: Any) -> bool:
    is_array = isinstance(emitted, jax.ShapeDtypeStruct)
    return is_array and emitted.shape[1:] == gradient.shape[1:] and emitted.dtype == gradient.dtype


def _room(leaf: SlicedLeaf, gradient: jax.Array) -> Any:
    """Memory for the update of a leaf."""
    size, rows = leaf.cut.size, leaf.cut.rows
    partition = explicit_sharding.partition_of(gradient)

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        own = partition if x.ndim == gradient.ndim else None
        return explicit_sharding.zeros((x.shape[0] * size // rows, *x.shape[1:]), x.dtype, own)

    return jax.tree.map(zeros, leaf.emitted)
