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
from lowrank_optax.slices.call import Call, Path
from lowrank_optax.slices.loop import run
from lowrank_optax.slices.plan import Budget, Group, groups_of
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
                groups = groups_of(call, Budget(), chosen, parts)
            except CannotCutError:
                groups = []
            if groups:
                return updated(call, groups, state)
        return tx.update(updates, state, params, whole=whole, **extra_args)

    return update


def updated(call: Call, groups: Sequence[Group], state: Any) -> tuple[Any, Any]:
    """The updates, in the memory of the gradients where they fit there, and the new state."""
    new, arrays = _by_groups(call, groups, _in_place_of_gradients)
    return call.treedef.unflatten(new), _like(state, arrays)


def applied(call: Call, groups: Sequence[Group], state: Any) -> tuple[Any, Any]:
    """The new parameters, in the memory of the old ones, and the new state."""
    new, arrays = _by_groups(call, groups, _in_place_of_params)
    cut = {i for group in groups for i in group.leaves}
    params = [x if i in cut else optax.apply_updates(call.likes[i], x) for i, x in enumerate(new)]
    return call.treedef.unflatten(params), _like(state, arrays)


def _by_groups(
    call: Call, groups: Sequence[Group], run_group: Callable[..., Any]
) -> tuple[list[Any], dict[Path, Any]]:
    """The result for each leaf, and the new state by its paths."""
    results: list[Any] = [None] * len(call.gradients)
    cut = {i for group in groups for i in group.leaves}
    rest = [i for i in range(len(results)) if i not in cut]
    pick = lambda xs: [xs[i] for i in rest]
    updates, arrays = call.update(rest, pick(call.gradients), pick(call.likes), {}, call.whole)
    for i, update in zip(rest, updates, strict=True):
        results[i] = update
    for group in groups:
        new, own = run_group(call, group)
        arrays |= dict(zip(group.own, own, strict=True))
        for i, result in zip(group.leaves, new, strict=True):
            results[i] = result
    return results, arrays


def _in_place_of_gradients(call: Call, group: Group) -> tuple[list[Any], list[Any]]:
    """The updates of a group's leaves, in the memory of their gradients where they fit there."""
    gradients = [call.gradients[i] for i in group.leaves]
    likes = [call.likes[i] for i in group.leaves] if call.has_params else []
    fits = [_fits(*pair) for pair in zip(gradients, group.emitted, strict=True)]
    buffers = [
        gradient if fit else _room(emitted, gradient, group)
        for gradient, emitted, fit in zip(gradients, group.emitted, fits, strict=True)
    ]
    apart = [None if fit else gradient for gradient, fit in zip(gradients, fits, strict=True)]

    def step(carried: Any, read: Any, row: jax.Array) -> Any:
        (slices, own), (apart, likes) = carried, read
        of_slices = [x if fit else y for x, y, fit in zip(slices, apart, fits, strict=True)]
        return _updated(call, group, of_slices, likes or of_slices, own, row)

    own = [call.state[path] for path in group.own]
    return run(step, (buffers, own), (apart, likes), group.cut)


def _in_place_of_params(call: Call, group: Group) -> tuple[list[Any], list[Any]]:
    """The new parameters of a group's leaves."""

    def step(carried: Any, gradients: Any, row: jax.Array) -> Any:
        params, own = carried
        updates, own = _updated(call, group, gradients, params, own, row)
        return list(map(optax.apply_updates, params, updates)), own

    gradients, params = ([xs[i] for i in group.leaves] for xs in (call.gradients, call.likes))
    return run(step, (params, [call.state[path] for path in group.own]), gradients, group.cut)


def _updated(
    call: Call, group: Group, gradients: Any, likes: Any, own: Any, row: jax.Array
) -> tuple[list[Any], list[Any]]:
    """The updates of slices, and their own new state."""
    whole = call.whole._replace(row=row, settled=True)
    state = dict(zip(group.own, own, strict=True))
    updates, arrays = call.update(group.leaves, gradients, likes, state, whole)
    return updates, [arrays[path] for path in group.own]


def _fits(gradient: Any, emitted: Any) -> bool:
    is_array = isinstance(emitted, jax.ShapeDtypeStruct)
    return is_array and emitted.shape[1:] == gradient.shape[1:] and emitted.dtype == gradient.dtype


def _room(emitted: Any, gradient: jax.Array, group: Group) -> Any:
    """Memory for the updates of a leaf, of whose slices the types are given."""
    size, rows = group.cut.size, group.cut.rows
    partition = explicit_sharding.partition_of(gradient)

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        own = partition if x.ndim == gradient.ndim else None
        return explicit_sharding.zeros((x.shape[0] * size // rows, *x.shape[1:]), x.dtype, own)

    return jax.tree.map(zeros, emitted)


def _like(state: Any, arrays: dict[Path, Any]) -> Any:
    """The arrays in the structure of a state."""
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    return structure.unflatten([arrays[path] for path, _ in paths])
