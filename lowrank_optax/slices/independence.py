"""Whether a transformation gives the same, leaf by leaf and slice by slice.

Read from traced programs: what reaches which update, whether rows are kept apart, and whether the
program for a slice is that for the whole tree.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.compat.jax import (
    ClosedJaxpr,
    JaxprEqn,
    interpret,
    jaxpr_of,
    primitive_name,
    shape_of,
    sub_jaxprs,
)
from lowrank_optax.compat.operations import (
    iota_size,
    is_elementwise,
    is_only_reshaped,
    repeats_rows,
    row_operands,
    settings,
    sizes_along,
)
from lowrank_optax.matrices.paths import leaves_by_path
from lowrank_optax.slices.call import Call, CannotCutError, Path, shapes_of_state
from lowrank_optax.slices.known_transformations import check_leaves, is_known, unknown_parts
from lowrank_optax.slices.loop import Cut, part_of, rows_of


def check_parts(call: Call, parts: Sequence[optax.GradientTransformation]) -> None:
    """Raises CannotCutError if a part of the call's transformation does not work leaf by leaf."""
    for part in parts:
        check_leaves(part)
        check_leaves_apart(call, part)


def check_leaves_apart(call: Call, part: optax.GradientTransformation) -> None:
    """Raises CannotCutError if a part of the call's transformation mixes leaves."""
    if is_known(part):
        return
    params = call.tree(dict(enumerate(call.params)))
    part = optax.with_extra_args_support(part)
    try:
        state = leaves_by_path(shapes_of_state(part, params))
        independent = _leaves_are_independent(call._replace(tx=part, state=state))
    except Exception as error:
        raise CannotCutError("the update cannot be tried on some leaves alone.") from error
    if not independent:
        names = ", ".join(unknown_parts(part))
        raise CannotCutError(
            f"the update of a leaf depends on others, or a count on gradients: {names}."
        )


def _leaves_are_independent(call: Call) -> bool:
    """Whether nothing goes from a leaf to another's results, or to a state that belongs to none."""
    everyone = range(len(call.gradients))
    structure = jax.tree.structure(call.state_shapes(everyone))
    owner = {path: i for i in everyone for path in leaves_by_path(call.state_shapes([i]))}
    owner |= dict.fromkeys(call.shared())
    owners = [owner[path] for path in call.state]

    def update(gradients: Any, params: Any, arrays: Any) -> tuple[Any, Any]:
        updates, state = call.tx.update(
            call.treedef.unflatten(gradients),
            structure.unflatten(arrays),
            call.treedef.unflatten(params) if call.has_params else None,
            **call.extra_args,
        )
        return call.treedef.flatten_up_to(updates), jax.tree.leaves(state)

    arguments = call.gradients, call.params, list(call.state.values())
    program, (updates, _) = jax.make_jaxpr(update, return_shape=True)(*arguments)
    indices = lambda trees: [i for i, tree in enumerate(trees) for _ in jax.tree.leaves(tree)]
    inputs = [*everyone, *indices(call.params), *owners]
    found = sources(program, [frozenset() if i is None else frozenset((i,)) for i in inputs])
    targets = [*indices(updates), *owners]
    return all(reached <= {target} for reached, target in zip(found, targets, strict=True))


def rows_are_independent(call: Call, index: int, parts: Sequence[Any]) -> bool:
    """Whether in the programs of these parts no row of a leaf reaches what another one gets."""
    return all(_keeps_rows_apart(_of_part(call, part), index) for part in parts)


def _of_part(call: Call, part: optax.GradientTransformation) -> Call:
    """The call, of a part of its transformation."""
    if part is call.tx:
        return call
    call = call._replace(tx=optax.with_extra_args_support(part))
    shapes = call.state_shapes(range(len(call.gradients)))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if x.size == 1 else x, shapes)
    return call._replace(state=leaves_by_path(state))


def _keeps_rows_apart(call: Call, index: int) -> bool:
    shared, state = call.shared(), leaves_by_path(call.state_shapes([index]))
    own = [path for path in state if path not in shared | call.flags]

    def update(gradient: Any, param: Any, states: list[Any]) -> Any:
        arrays = dict(zip(own, states, strict=True))
        whole = call.whole._replace(settled=True)
        updates, new = call.update([index], [gradient], [param], arrays, whole)
        return (updates[0], [new[x] for x in own]), [new[x] for x in new if x in shared]

    arrays = call.gradients[index], call.params[index], [call.state[path] for path in own]
    program, (of_leaf, _) = jax.make_jaxpr(update, return_shape=True)(*arrays)
    size = (call.gradients[index].shape[0],)
    inputs = [ROWS if x.shape[:1] == size else MIXED for x in jax.tree.leaves(arrays)]
    found, count = rows_of_results(program, inputs), len(jax.tree.leaves(of_leaf))
    return all(x in (ROWS, ALIKE) for x in found[:count]) and not {ROWS, MIXED} & set(found[count:])


class WholeUpdate(NamedTuple):
    """What the update of all leaves computes.

    Attributes:
      updates: The types of each leaf's update.
      of_updates: Fingerprints of their arrays.
      of_state: Fingerprint of each array of the new state.
    """

    updates: Sequence[Any]
    of_updates: Sequence[list[int]]
    of_state: Mapping[Path, int]


def whole_update(call: Call) -> WholeUpdate:
    """What the update of all leaves of a call computes."""
    everyone, paths = range(len(call.gradients)), list(call.state)

    def update(gradients: Any, params: Any, arrays: Any) -> Any:
        around = call._replace(state=dict(zip(paths, arrays, strict=True)))
        whole = call.whole._replace(settled=True)
        updates, state = around.update(everyone, gradients, params, {}, whole)
        return updates, [state[path] for path in paths]

    arrays = list(call.gradients), list(call.params), list(call.state.values())
    program, (updates, _) = jax.make_jaxpr(update, return_shape=True)(*arrays)
    inputs = [("gradient", i) for i in everyone]
    inputs += [x for i in everyone for x in _parameter(call, i)]
    found = iter(fingerprints(program, [*inputs, *map(_array, paths)], {}))
    of_updates = [[next(found) for _ in jax.tree.leaves(update)] for update in updates]
    return WholeUpdate(updates, of_updates, dict(zip(paths, found, strict=True)))


def emitted_by_slice(
    call: Call, index: int, cut: Cut, own: Sequence[Path], whole: WholeUpdate
) -> Any | None:
    """The type of a slice's update, if its program is that in the tree, but for the sizes."""
    sizes = [rows for rows in (cut.rows, cut.rest) if rows]
    found = [_of_slice(call, index, cut, own, whole, rows) for rows in sizes]
    return None if any(x is None for x in found) else found[0]


def _of_slice(
    call: Call, index: int, cut: Cut, own: Sequence[Path], whole: WholeUpdate, rows: int
) -> Any | None:
    arrays = call.gradients[index], call.params[index], [call.state[path] for path in own]
    part = jax.eval_shape(lambda: jax.tree.map(lambda x: rows_of(x, 0, rows, cut), arrays))
    paths: list[Path] = []

    def update(part: Any, numbers: jax.Array) -> Any:
        update, state = call.slice_of(index, part, own, numbers, rows // cut.shards)
        paths[:] = [path for path in state if path not in call.flags]
        return update, [state[path] for path in paths]

    numbers = jax.ShapeDtypeStruct((rows,), jnp.int32)
    program, (new, state) = jax.make_jaxpr(update, return_shape=True)(part, numbers)
    inputs = [("gradient", index), *_parameter(call, index), *map(_array, own)]
    known = {id(x): _array(path) for path, x in call.state.items()}
    found = fingerprints(program, [*inputs, numbers_of(cut.size)], known)
    expected = [*whole.of_updates[index], *(whole.of_state[path] for path in paths)]
    new_own = [dict(zip(paths, state, strict=True))[path] for path in own]
    share = lambda x: (part_of(x.shape[0], rows, cut.size), *x.shape[1:])
    agrees = found == expected and _types(new_own) == _types(part[2])
    return new if agrees and _types(new) == _types(whole.updates[index], share) else None


def _parameter(call: Call, index: int) -> list[Any]:
    return [("parameter", index, k) for k in range(len(jax.tree.leaves(call.params[index])))]


def _array(path: Path) -> Any:
    return "array", jax.tree_util.keystr(path)


def _types(tree: Any, shape: Callable[[Any], tuple[int, ...]] = jnp.shape) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return [(shape(x), x.dtype) for x in leaves], structure


# What the rows of an array, along its first axis, depend on: each on the same row of the inputs
# alone; on no row, the same in all of them; on no row, but different, as in a table; on any row.
ROWS, ALIKE, OTHER, MIXED = "rows", "alike", "other", "mixed"


def sources(program: ClosedJaxpr, inputs: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """The labels of all inputs that each result may depend on."""
    return interpret(
        program,
        inputs,
        rule=lambda equation, operands: [frozenset().union(*operands)] * len(equation.outvars),
        constant=lambda x: frozenset(),
        join=lambda index, results: index.union(*results),
    )


def rows_of_results(program: ClosedJaxpr, inputs: Sequence[str]) -> list[str]:
    """Whether rows are kept apart: `ROWS`, `ALIKE`, `OTHER` or `MIXED` for each result.

    The number of rows may go into any of them; `fingerprints` differ then.
    """
    return interpret(
        program,
        inputs,
        rule=_rows,
        constant=lambda x: OTHER if np.shape(x) else ALIKE,
        join=lambda index, results: MIXED if index in (ROWS, MIXED) else _together(results),
    )


def _rows(equation: JaxprEqn, states: Sequence[str]) -> list[str]:
    if equation.effects or MIXED in states:
        return [MIXED] * len(equation.outvars)
    if is_elementwise(equation):
        return [_together(states)]
    if ROWS not in states:
        alike = repeats_rows(equation)
        return [ALIKE if alike or not shape_of(x) else OTHER for x in equation.outvars]
    by_row = row_operands(equation)
    apart = len(by_row) > 0 and all(
        state in (ROWS, ALIKE) if i in by_row else state != ROWS for i, state in enumerate(states)
    )
    return [ROWS if apart else MIXED] * len(equation.outvars)


def _together(states: Sequence[str]) -> str:
    if MIXED in states or (ROWS in states and OTHER in states):
        return MIXED
    return next((state for state in (ROWS, OTHER) if state in states), ALIKE)


def fingerprints(
    program: ClosedJaxpr, inputs: Sequence[Any], known: Mapping[int, Any]
) -> list[int]:
    """The fingerprint of each result: sizes of axes that stay are left out, all else counts.

    The program for a slice of a leaf has those of the program for the whole tree unless it goes by
    the number of rows, by the leaf's position, or by what the other leaves are.

    Args:
      program: The program.
      inputs: What each argument is, as anything that can be hashed.
      known: What constants are, by their ``id``. Whole numbers from zero on are `numbers_of`.
    """
    constant = lambda x: hash(known[id(x)] if id(x) in known else _content(x))
    return _fingerprints(program, list(map(hash, inputs)), constant)


def numbers_of(size: int) -> Any:
    """What the numbers of ``size`` rows are, in order."""
    return "numbers", size


def _fingerprints(program: Any, inputs: Sequence[int], constant: Callable[[Any], int]) -> list[int]:
    return interpret(
        program,
        inputs,
        rule=functools.partial(_fingerprint, constant),
        constant=constant,
        join=lambda index, results: hash((index, *results)),
    )


def _fingerprint(
    constant: Callable[[Any], int], equation: JaxprEqn, operands: Sequence[int]
) -> Sequence[int]:
    if is_only_reshaped(equation):
        return operands[:1]
    size = iota_size(equation)
    if size is not None:
        return [hash(numbers_of(size))]
    base = primitive_name(equation), *operands, *settings(equation), *sizes_along(equation)
    for body in sub_jaxprs(equation):
        base += (*_fingerprints(body, range(len(jaxpr_of(body).invars)), constant),)
    return [hash((base, i)) for i in range(len(equation.outvars))]


def _content(x: Any) -> Any:
    if isinstance(x, jax.core.Tracer):
        return id(x), np.shape(x)
    if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.shape(x), hashlib.sha256(np.asarray(x).tobytes()).digest()
