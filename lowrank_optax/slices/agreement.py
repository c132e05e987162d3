"""Whether a slice of a leaf gets what the leaf gets in the whole tree: by what is computed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.slices.call import Call, Path
from lowrank_optax.slices.fingerprints import fingerprints, numbers_of
from lowrank_optax.slices.loop import Cut, part_of, taken


class InTree(NamedTuple):
    """What the whole update computes.

    Attributes:
      updates: The types of each leaf's update.
      of_updates: Fingerprints of their arrays.
      of_state: Fingerprint of each array of the new state.
    """

    updates: Sequence[Any]
    of_updates: Sequence[list[int]]
    of_state: Mapping[Path, int]


def in_tree(call: Call) -> InTree:
    """What the whole update of a call computes."""
    everyone, paths = range(len(call.paths)), list(call.state)

    def update(gradients: Any, likes: Any, arrays: Any) -> Any:
        around = call._replace(state=dict(zip(paths, arrays, strict=True)))
        whole = call.whole._replace(settled=True)
        updates, state = around.update(everyone, gradients, likes, {}, whole)
        return updates, [state[path] for path in paths]

    arrays = list(call.gradients), list(call.likes), list(call.state.values())
    closed, (updates, _) = jax.make_jaxpr(update, return_shape=True)(*arrays)
    inputs = [("gradient", i) for i in everyone]
    inputs += [x for i in everyone for x in _parameter(i, call.likes[i])]
    found = iter(fingerprints(closed, [*inputs, *map(_array, paths)], {}))
    of_updates = [[next(found) for _ in jax.tree.leaves(update)] for update in updates]
    return InTree(updates, of_updates, dict(zip(paths, found, strict=True)))


def emitted_by_slice(
    call: Call, place: int, cut: Cut, own: Sequence[Path], whole: InTree
) -> Any | None:
    """The type of a slice's update, if its program is that in the tree, but for the sizes."""
    sizes = [rows for rows in (cut.rows, cut.rest) if rows]
    found = [_of_slice(call, place, cut, own, whole, rows) for rows in sizes]
    return None if any(x is None for x in found) else found[0]


def _of_slice(
    call: Call, place: int, cut: Cut, own: Sequence[Path], whole: InTree, rows: int
) -> Any | None:
    arrays = call.gradients[place], call.likes[place], [call.state[path] for path in own]
    part = jax.eval_shape(lambda: jax.tree.map(lambda x: taken(x, 0, rows, cut), arrays))
    paths: list[Path] = []

    def update(part: Any, numbers: jax.Array) -> Any:
        update, state = call.slice_of(place, part, own, numbers, rows // cut.shards)
        paths[:] = state
        return update, list(state.values())

    numbers = jax.ShapeDtypeStruct((rows,), jnp.int32)
    closed, (new, state) = jax.make_jaxpr(update, return_shape=True)(part, numbers)
    inputs = [("gradient", place), *_parameter(place, call.likes[place]), *map(_array, own)]
    known = {id(x): _array(path) for path, x in call.state.items()}
    found = fingerprints(closed, [*inputs, numbers_of(cut.size)], known)
    expected = [*whole.of_updates[place], *(whole.of_state[path] for path in paths)]
    kept = [dict(zip(paths, state, strict=True))[path] for path in own]
    share = lambda x: (part_of(x.shape[0], rows, cut.size), *x.shape[1:])
    agrees = found == expected and _types(kept) == _types(part[2])
    return new if agrees and _types(new) == _types(whole.updates[place], share) else None


def _parameter(place: int, like: Any) -> list[Any]:
    return [("parameter", place, k) for k in range(len(jax.tree.leaves(like)))]


def _array(path: Path) -> Any:
    return "array", jax.tree_util.keystr(path)


def _types(tree: Any, shape: Callable[[Any], tuple[int, ...]] = jnp.shape) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return [(shape(x), x.dtype) for x in leaves], structure
