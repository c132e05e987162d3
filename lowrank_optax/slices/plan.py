"""What is cut, and into how many slices: decided from shapes alone."""

from collections.abc import Callable, Mapping, Sequence
import functools
import functools
import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.paths import normalised_path, owner_of
from lowrank_optax.slices.call import Call, Path, grown
from lowrank_optax.slices.independence import check_parts, is_known, rows_are_independent
from lowrank_optax.slices.loop import Cut, taken
from lowrank_optax.slices.whole import CannotCutError

Slices: TypeAlias = int | Literal["off"] | None

LEAST_BUDGET = 16 * 2**20
SHARE_OF_TREE = 64
# What an update makes of a leaf in float32 at a time: the gradient, a moment, the answer.
BYTES_AN_ELEMENT = 12
# Rows of a leaf of two axes come in whole tiles, of 4-bit codes too.
ROWS = 64


class Budget(NamedTuple):
    """How much memory temporaries may take.

    Attributes:
      slices: So many slices of every leaf that can be cut; ``"off"`` for none; None for as few as
        fit into ``bytes``, and whole leaves where they do.
      bytes: None for a 64th of the gradients, and at least 16 MiB.
    """

    slices: Slices = None
    bytes: int | None = None


class Group(NamedTuple):
    """Leaves of one shape that are cut alike, and run through one loop.

    Attributes:
      leaves: Their indices.
      cut: Where slices begin and end.
      own: Paths of the arrays of the state that belong to them.
      emitted: The types of a slice's updates, for each leaf.
    """

    leaves: tuple[int, ...]
    cut: Cut
    own: tuple[Path, ...]
    emitted: tuple[Any, ...]


def groups_of(
    call: Call,
    budget: Budget,
    chosen: Callable[[Call], Sequence[bool]],
    parts: Sequence[optax.GradientTransformation],
) -> list[Group]:
    """The leaves to be cut, in groups; what is in none of them runs whole.

    Raises:
      CannotCutError: If one of the parts does not work leaf by leaf.
    """
    if budget.slices == "off" or not _all_whole(call):
        return []
    every = {i: _cut_of(call, i, budget) for i in range(len(call.gradients))}
    cuts = {i: cut for i, cut in every.items() if cut is not None}
    if not cuts:
        return []
    wanted = chosen(call)
    cuts = {i: cut for i, cut in cuts.items() if wanted[i]}
    check_parts(call, parts)
    if not all(map(is_known, parts)):
        cuts = {i: cut for i, cut in cuts.items() if rows_are_independent(call, i)}
    own = _own_states(call, cuts)
    alike: dict[Any, list[int]] = {}
    for i, paths in own.items():
        types = [jax.typeof(call.state[path]) for path in paths]
        leaf = jax.typeof(call.gradients[i]), *map(jax.typeof, jax.tree.leaves(call.likes[i]))
        alike.setdefault((cuts[i], leaf, tuple(types)), []).append(i)
    together = [
        tuple(members[start : start + count])
        for (cut, *_), members in alike.items()
        for count in [_how_many(call, members[0], cut, budget)]
        for start in range(0, len(members), count)
    ]
    groups = [_group(call, leaves, cuts[leaves[0]], own) for leaves in together]
    return [group for group in groups if group is not None]


def _all_whole(call: Call) -> bool:
    """Whether no gradient arrives in another shape than its parameter's, as one projected does."""
    return all(
        not isinstance(like, jax.Array) or like.shape == gradient.shape
        for gradient, like in zip(call.gradients, call.likes, strict=True)
    )


def _bytes_of(call: Call, budget: Budget) -> int:
    if budget.bytes is not None:
        return budget.bytes
    leaves = jax.tree.leaves(call.whole.tree)
    return max(LEAST_BUDGET, sum(x.size * x.dtype.itemsize for x in leaves) // SHARE_OF_TREE)


def _cut_of(call: Call, i: int, budget: Budget) -> Cut | None:
    """How a leaf is cut; None if it is not."""
    leaf = call.gradients[i]
    if leaf.ndim < 2 or leaf.size == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    size, shards = leaf.shape[0], _shards(call, i)
    slices = budget.slices
    if slices is None:
        slices = math.ceil(leaf.size * BYTES_AN_ELEMENT / _bytes_of(call, budget))
    assert isinstance(slices, int)
    run = shards if leaf.ndim > 2 else math.lcm(shards, ROWS)
    run = run if run < size else shards
    rows = math.ceil(size / slices / run) * run
    if budget.slices is None and leaf.ndim > 2:
        # Layers too many to fit would not be worth a shorter last slice, which is compiled as well.
        rows = max(run, (size // slices) // run * run)
        rows = next((r for r in range(rows, rows // 2, -1) if size % r == r % shards == 0), rows)
    return Cut(size, rows, shards) if rows < size else None


def _shards(call: Call, i: int) -> int:
    """In how many parts the first axis may lie on devices."""
    arrays = [call.gradients[i], *jax.tree.leaves(call.likes[i])]
    shardings = [jax.typeof(x).sharding for x in arrays]
    meshes = [jax.sharding.get_abstract_mesh(), *(s.mesh for s in shardings)]
    partition = explicit_sharding.partition_of(arrays[0])
    if partition is not None:
        names = partition[0] if isinstance(partition[0], tuple) else (partition[0],)
        return math.prod(shardings[0].mesh.shape[name] for name in names if name is not None)
    # Of automatic axes the compiler alone knows which are sharded.
    return math.gcd(arrays[0].shape[0], max(1, *(mesh.size for mesh in meshes)))


def _own_states(call: Call, cuts: Mapping[int, Cut]) -> dict[int, list[Path]]:
    """For each leaf the paths of its own state, if all of that has the leaf's rows."""
    leaves = list(cuts)
    shared = call.shared()
    once = _by_path(call.state_shapes(leaves))
    twice = _by_path(call.init_shapes(leaves, [grown(call.likes[i]) for i in leaves]))
    names = {normalised_path(call.paths[i]): i for i in leaves}
    own: dict[int, list[Path]] = {i: [] for i in leaves}
    refused = set()
    for path in once | twice:
        if path in shared:
            continue
        name = owner_of(path, names)
        if name is None:
            return {}
        i = names[name]
        if path in once and path in twice and _has_rows(once[path], twice[path], cuts[i]):
            own[i].append(path)
        else:
            refused.add(i)
    return {i: paths for i, paths in own.items() if i not in refused}


def _by_path(tree: Any) -> dict[Path, Any]:
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def _has_rows(once: Any, twice: Any, cut: Cut) -> bool:
    """Whether an array has the rows of its leaf along its first axis, or a fixed part of them."""
    if once.ndim == 0 or twice.shape != (2 * once.shape[0], *once.shape[1:]):
        return False
    pieces = [cut.shards * cut.size // math.gcd(cut.size, n) for n in (cut.rows, cut.rest) if n]
    return all(once.shape[0] % piece == 0 for piece in pieces)


def _how_many(call: Call, i: int, cut: Cut, budget: Budget) -> int:
    """How many leaves of one kind go through a loop together, for slices are compiled once."""
    if budget.slices is not None:
        return len(call.gradients)
    slice_bytes = call.gradients[i].size // cut.size * cut.rows * BYTES_AN_ELEMENT
    return max(
        1, int(__import__("os").environ.get("GF", "1")) * _bytes_of(call, budget) // slice_bytes
    )


def _group(
    call: Call, leaves: tuple[int, ...], cut: Cut, own: Mapping[int, list[Path]]
) -> Group | None:
    paths = tuple(path for i in leaves for path in own[i])

    def emitted(rows: int, *arrays: Any) -> Any:
        gradients, likes, own = jax.tree.map(lambda x: taken(x, 0, rows, cut), arrays)
        whole = call.whole._replace(row=jnp.int32(0), settled=True)
        state = dict(zip(paths, own, strict=True))
        return call.update(leaves, gradients, likes, state, whole)[0]

    pick = lambda xs: [xs[i] for i in leaves]
    states = [call.state[path] for path in paths]
    arrays = pick(call.gradients), pick(call.likes), states
    try:
        if cut.rest:
            jax.eval_shape(functools.partial(emitted, cut.rest), *arrays)
        types = jax.eval_shape(functools.partial(emitted, cut.rows), *arrays)
    except CannotCutError:
        return None
    return Group(leaves, cut, paths, tuple(types))
