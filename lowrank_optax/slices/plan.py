"""Which leaves are cut, and into how many slices: from shapes, and from traced programs."""

from collections.abc import Callable, Sequence
import math
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.paths import leaves_by_path
from lowrank_optax.slices.call import Call, Path
from lowrank_optax.slices.independence import (
    WholeUpdate,
    check_parts,
    emitted_by_slice,
    rows_are_independent,
    whole_update,
)
from lowrank_optax.slices.known_transformations import is_known
from lowrank_optax.slices.loop import Cut

Slices: TypeAlias = int | Literal["off"] | None
T = TypeVar("T")

LEAST_BUDGET = 16 * 2**20
SHARE_OF_TREE = 64
# Temporaries of an update per element, in float32: the gradient, a moment, the result.
BYTES_AN_ELEMENT = 12
# Rows of a leaf of two axes come in whole tiles, also of 4-bit codes.
ROWS = 64


class Budget(NamedTuple):
    """How much memory temporaries may take.

    Attributes:
      slices: Number of slices of every leaf that can be cut; ``"off"`` for none; None for as few
        as fit into ``bytes``, and whole leaves where they do.
      bytes: Size of temporaries; None for a 64th of the gradients, and at least 16 MiB.
    """

    slices: Slices = None
    bytes: int | None = None


class SlicedLeaf(NamedTuple):
    """A leaf that is cut.

    Attributes:
      index: Its index among the leaves.
      cut: Where slices begin and end.
      own: Paths of the arrays of the state that belong to it.
      emitted: The type of a slice's update, an array or a tree of arrays.
      flags: Paths of its flags: see `Call`.
    """

    index: int
    cut: Cut
    own: tuple[Path, ...]
    emitted: Any
    flags: tuple[Path, ...] = ()


def sliced_leaves(
    call: Call,
    budget: Budget,
    chosen: Callable[[Call], Sequence[bool]],
    parts: Sequence[optax.GradientTransformation],
    failures: list[Exception] | None = None,
) -> list[SlicedLeaf]:
    """The leaves that are to be cut; all others run whole.

    Args:
      call: What ``update`` is called with.
      budget: How large temporaries may be.
      chosen: For each leaf of a call whether slices save memory.
      parts: What the call's transformation was given: see `update_in_slices`.
      failures: List to which is added what was raised where a part of the tree was tried.

    Raises:
      CannotCutError: If one of the parts does not work leaf by leaf.
    """
    failures = [] if failures is None else failures
    pairs = list(zip(call.gradients, call.params, strict=True))
    projected = any(isinstance(p, jax.Array) and p.shape != g.shape for g, p in pairs)
    if budget.slices == "off" or projected:
        return []
    arrays = jax.tree.leaves((call.gradients, call.params, list(call.state.values())))
    if budget.slices is None and not any(isinstance(x, jax.core.Tracer) for x in arrays):
        return []  # outside of jit nothing is in place, and each loop would be compiled again
    budget_bytes = budget.bytes
    if budget_bytes is None:
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(call.whole.tree))
        budget_bytes = max(LEAST_BUDGET, total // SHARE_OF_TREE)
    cuts: dict[int, Cut] = {}
    for i, (gradient, param) in enumerate(pairs):
        cut = cut_of([gradient, *jax.tree.leaves(param)], budget_bytes, budget.slices)
        if cut is not None:
            cuts[i] = cut
    if not cuts:
        return []
    wanted, shared = tried(failures, chosen, call), tried(failures, call.shared)
    if wanted is None or shared is None:
        return []
    owned = [
        (i, cut, own)
        for i, cut in cuts.items()
        if wanted[i] and (own := tried(failures, own_state, call, i, cut, shared)) is not None
    ]
    if not owned:
        return []
    check_parts(call, parts)
    unknown = [part for part in parts if not is_known(part)]
    whole = tried(failures, whole_update, call)
    if whole is None:
        return []
    leaves = [tried(failures, sliced_leaf, call, *each, whole, unknown) for each in owned]
    found = [leaf for leaf in leaves if leaf is not None]
    return found if found and tried(failures, _runs_without, call, found) else []


def tried(failures: list[Exception], function: Callable[..., T], *args: Any) -> T | None:
    """``function(*args)``; None if that cannot be computed for a part of a tree.

    What it raises is added to ``failures``, so that a refusal can name its cause.
    """
    try:
        return function(*args)
    except Exception as error:
        failures.append(error)
        return None


def _runs_without(call: Call, leaves: Sequence[SlicedLeaf]) -> bool:
    """Whether what is left can be run: rules that must find something may find nothing there."""
    found = {path for leaf in leaves for path in leaf.own}
    jax.eval_shape(lambda: found.update(call.without({leaf.index for leaf in leaves})[1]))
    return found == call.state.keys()


def cut_of(
    arrays: Sequence[jax.Array], budget_bytes: int = LEAST_BUDGET, slices: Slices = None
) -> Cut | None:
    """How a leaf is cut; None if it is not.

    Args:
      arrays: The leaf, and others that have its rows.
      budget_bytes: How large temporaries of a slice may be.
      slices: How many slices instead.
    """
    leaf = arrays[0]
    if leaf.ndim < 2 or leaf.size == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    size, shards = leaf.shape[0], _shards(arrays)
    fitting = slices is None
    count = math.ceil(leaf.size * BYTES_AN_ELEMENT / budget_bytes) if fitting else slices
    assert isinstance(count, int)
    if count <= 1:
        return None
    run = shards if leaf.ndim > 2 else shards * ROWS
    run = run if run < size else shards
    rows = math.ceil(size / count / run) * run
    if fitting:
        # A few more slices are better than a shorter last one, which is compiled as well.
        most = max(run, size // count // run * run)
        even = (r for r in range(most, most // 2, -run) if size % r == 0)
        rows = next(even, most)
    return Cut(size, rows, shards) if rows < size else None


def _shards(arrays: Sequence[jax.Array]) -> int:
    """The number of parts of the first axis on different devices, or that may be."""
    shardings = [jax.typeof(x).sharding for x in arrays]
    meshes = [jax.sharding.get_abstract_mesh(), *(s.mesh for s in shardings)]
    partition = explicit_sharding.partition_of(arrays[0])
    if partition is not None:
        names = partition[0] if isinstance(partition[0], tuple) else (partition[0],)
        return math.prod(shardings[0].mesh.shape[name] for name in names if name is not None)
    # Only the compiler knows which automatic axes are sharded.
    return math.gcd(arrays[0].shape[0], max(1, *(mesh.size for mesh in meshes)))


def own_state(call: Call, index: int, cut: Cut, shared: set[Path]) -> tuple[Path, ...] | None:
    """Paths of the leaf's own state, if all of that has the leaf's rows."""
    double = lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype)
    once = leaves_by_path(call.state_shapes([index]))
    doubled = [jax.tree.map(double, call.params[index])]
    twice = leaves_by_path(call.state_shapes([index], doubled))
    own = tuple(path for path in once if path not in shared)
    same = once.keys() == twice.keys()
    return own if same and all(_has_rows(once[x], twice[x], cut) for x in own) else None


def sliced_leaf(
    call: Call,
    index: int,
    cut: Cut,
    own: tuple[Path, ...],
    whole: WholeUpdate,
    unknown: Sequence[optax.GradientTransformation],
) -> SlicedLeaf | None:
    """The leaf, if what a slice of it gets is what the leaf gets in the tree, cut."""
    if not rows_are_independent(call, index, unknown):
        return None
    emitted = emitted_by_slice(call, index, cut, own, whole)
    return None if emitted is None else SlicedLeaf(index, cut, own, emitted)


def _has_rows(once: Any, twice: Any, cut: Cut) -> bool:
    """Whether an array has the rows of its leaf along its first axis, or a fixed part of them."""
    if once.ndim == 0 or twice.shape != (2 * once.shape[0], *once.shape[1:]):
        return False
    pieces = [cut.shards * cut.size // math.gcd(cut.size, n) for n in (cut.rows, cut.rest) if n]
    return all(once.shape[0] % piece == 0 for piece in pieces)
