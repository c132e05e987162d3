"""The update of a tree in parts: leaves at different times, and a stack's layers one by one.

`update_in_backward` has no time at which all gradients exist. Here the same transformation runs on
the leaves whose gradients do, and on one layer of the leaves that are stacks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from lowrank_optax.matrices.paths import leaves_by_path, path_string
from lowrank_optax.slices.call import Call, CannotCutError, Path
from lowrank_optax.slices.independence import whole_update
from lowrank_optax.slices.known_transformations import is_known, looks_at
from lowrank_optax.slices.loop import Cut
from lowrank_optax.slices.plan import Budget, SlicedLeaf, own_state, sliced_leaf, tried
from lowrank_optax.slices.update import applied, fitting_leaves, of_slice

New = tuple[dict[int, Any], dict[Path, Any]]


def update_leaves(call: Call, gradients: Mapping[int, jax.Array]) -> New:
    """The update of some leaves alone, as `apply_in_slices` runs it.

    Args:
      call: The call of the whole tree. Its gradients are not read.
      gradients: Gradients of the leaves, by index.

    Returns:
      The new parameters by index; and the new arrays of the state that belong to these leaves or
      to none, by path.
    """
    params = call.tree({i: call.params[i] for i in gradients})
    shapes, structure = jax.tree_util.tree_flatten_with_path(call.state_shapes(list(gradients)))
    state = structure.unflatten([call.state[path] for path, _ in shapes])
    updates = call.tree(gradients)
    part = Call.of(call.tx, updates, state, params, call.whole, call.extra_args)
    new, arrays = applied(part, [] if looks_at(part.tx) else fitting_leaves(part, Budget()))
    return dict(zip(sorted(gradients), new, strict=True)), arrays


def leaves_of_stack(call: Call, indices: Sequence[int]) -> list[SlicedLeaf]:
    """Leaves ``[layers, ...]``, cut into their layers, of a transformation that works by leaves.

    Args:
      call: The call of the whole tree.
      indices: Which of its leaves are cut.

    Raises:
      CannotCutError: If the update of a layer is not what the layer gets in the whole tree.
    """
    unknown = [] if is_known(call.tx) else [call.tx]
    shared = call.shared()
    whole = whole_update(call)
    found = []
    for i in indices:
        failures: list[Exception] = []
        cut = Cut(call.params[i].shape[0], 1)
        own = tried(failures, own_state, call, i, cut, shared | call.flags)
        leaf = None
        if own is not None:
            leaf = tried(failures, sliced_leaf, call, i, cut, own, whole, unknown)
        if leaf is None:
            raise CannotCutError(
                f"the update of {path_string(call.paths[i])!r}, of shape {call.params[i].shape}, "
                "is not the same layer by layer: its state or its arithmetic spans layers."
            ) from next(iter(failures), None)
        flags = tuple(x for x in leaves_by_path(call.state_shapes([i])) if x in call.flags)
        found.append(leaf._replace(flags=flags))
    return found


def update_layer(
    call: Call, leaf: SlicedLeaf, gradient: jax.Array, param: Any, own: Any, row: jax.Array
) -> tuple[Any, list[Any], list[Any]]:
    """The new parameter of one layer ``[1, ...]`` of a stack, its own new state, and its flags."""
    arrays = [*own, *(call.state[path] for path in leaf.flags)]
    with_flags = leaf._replace(own=leaf.own + leaf.flags)
    update, new = of_slice(call, with_flags, gradient, param, arrays, row)
    return optax.apply_updates(param, update), new[: len(own)], new[len(own) :]
