"""A loop over slices of arrays along their first axes, which writes each result where it was read.

How a compiler is made to keep it in place differs from one to the other: see `run`.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.compat.jax import (
    Literal,
    draws_random_bits,
    in_default_layout,
    jaxpr_as_fun,
    new_jaxpr,
)
from lowrank_optax.matrices import explicit_sharding

Step = Callable[[Any, Sequence[Any], Any, jax.Array], tuple[Any, Sequence[Any]]]


class Cut(NamedTuple):
    """How the first axis of a leaf is cut: static.

    Attributes:
      size: Size of the axis.
      rows: Number of rows of each slice; the last may have fewer.
      shards: Number of equal parts of the axis on devices. A slice has the same number of rows of
        each, so that no device reads another's.
    """

    size: int
    rows: int
    shards: int = 1

    @property
    def full_slices(self) -> int:
        """Number of slices of ``rows``."""
        return self.size // self.rows

    @property
    def rest(self) -> int:
        """Rows of the last, shorter slice; zero if there is none."""
        return self.size % self.rows

    def rows_from(self, first: Any, rows: int) -> jax.Array:
        """Which rows of the leaf are in a slice, int32 ``[rows]``."""
        shards = jnp.arange(self.shards, dtype=jnp.int32)[:, None] * (self.size // self.shards)
        run = jnp.arange(rows // self.shards, dtype=jnp.int32)
        return jnp.reshape(shards + first // self.shards + run, (rows,))


def run(step: Callable[[Any, Any, jax.Array], Any], carried: Any, read: Any, cut: Cut) -> Any:
    """``carried`` after ``step`` has been run on each slice of it, in place: see `run_through`.

    Args:
      step: ``step(carried, read, row) -> carried`` of one slice, whose first row is ``row``.
      carried: A tree of arrays, read and written.
      read: A tree of arrays, only read.
      cut: Where slices begin and end.
    """

    def alone(through: Any, groups: Sequence[Any], read: Any, row: jax.Array) -> Any:
        return through, [step(groups[0], read, row)]

    return run_through(alone, None, [carried], read, cut)[1][0]


def run_through(
    step: Step,
    through: Any,
    groups: Sequence[Any],
    read: Any,
    cut: Cut,
    *,
    backwards: bool = False,
    fused: bool = False,
) -> tuple[Any, Sequence[Any]]:
    """``step`` run on one slice after another: each gets what the one before handed on.

    Every array but those of ``through`` has the rows of the leaf along its first axis, or a
    multiple or a share of them.

    On accelerators a barrier makes each result of a step an array of one slice that is then copied:
    fused into each write, the arithmetic would read one carried array after another has been
    written, and the compiler would copy all of it. The compiler for CPUs drops barriers, but does
    not look into a loop whose iterations it cannot count (nor into a conditional, within which it
    uses one thread only). It also converts a whole bfloat16 array to and fro for each part that is
    read or written, so such arrays go through the loop as integers of the same bits.

    Args:
      step: ``step(through, groups, read, row) -> (through, groups)`` of one slice, whose first row
        is ``row``.
      through: A tree of arrays that each step gets from the one before, whole.
      groups: Trees of arrays, read and written; the results of each are held apart from the others.
      read: A tree of arrays, only read.
      cut: Where slices begin and end.
      backwards: Whether the last slice comes first. All slices must then have the same size.
      fused: Whether results need no barrier on accelerators: for updates that are computed element
        by element, in one pass, from what a step made before. Arrays of one slice are saved.

    Returns:
      What the last step handed on, and the written arrays.
    """
    steps = {}
    for rows in filter(None, (cut.rows, cut.rest)):
        part = jax.tree.map(lambda x, rows=rows: rows_of(x, 0, rows, cut), (groups, read))
        steps[rows] = _drawn_before(step, through, *part, jnp.int32(0))
    loop = functools.partial(_run, steps, cut=cut, backwards=backwards)
    return jax.lax.platform_dependent(
        through,
        groups,
        read,
        cpu=functools.partial(loop, apart=_in_loop_of_one, carry=_bits),
        default=functools.partial(
            loop, apart=_in_layout if fused else _behind_barrier, carry=lambda x: x
        ),
    )


def _drawn_before(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """The function, for arguments of these types, with the random numbers it always draws drawn.

    A random basis is drawn from one seed wherever it is used, and compilers move no draw out of a
    loop.
    """
    traced, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
    program = traced.jaxpr
    known = set(program.constvars)
    before, drawn = [], []
    for equation in program.eqns:
        inputs = [x for x in equation.invars if not isinstance(x, Literal)]
        if not equation.effects and known.issuperset(inputs):
            known.update(equation.outvars)
            before.append(equation)
            if draws_random_bits(equation):
                drawn.append(equation)
    outside = [x for equation in drawn for x in equation.outvars]
    after = [equation for equation in program.eqns if equation not in drawn]
    part = lambda *of: jaxpr_as_fun(new_jaxpr(*of, name="slice"))
    draw = part(program.constvars, outside, before)
    run = part([*program.constvars, *outside, *program.invars], program.outvars, after)
    numbers = draw(*traced.consts) if drawn else []

    def of_slice(*arguments: Any) -> Any:
        results = run(*traced.consts, *numbers, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(result), results)

    return of_slice


def _behind_barrier(step: Step) -> Step:
    def held(through: Any, groups: Sequence[Any], read: Any, row: jax.Array) -> Any:
        through, new = step(through, groups, read, row)
        return through, [jax.lax.optimization_barrier(group) for group in new]

    return _in_layout(held)


def _in_layout(step: Step) -> Step:
    def pinned(through: Any, groups: Sequence[Any], read: Any, row: jax.Array) -> Any:
        groups, read = jax.tree.map(_in_rows, (groups, read))
        through, new = step(through, groups, read, row)
        return through, jax.tree.map(_in_rows, new)

    return pinned


def _in_rows(x: jax.Array) -> jax.Array:
    """``x`` stored in the order of its axes, if an argument of its shape is.

    Otherwise the whole array would be copied into the layout that suits one slice's arithmetic.
    """
    if x.ndim < 2 or x.shape[-1] % 128 or x.shape[-2] % 32:
        return x
    return in_default_layout(x)


def _in_loop_of_one(step: Step) -> Step:
    def looped(through: Any, groups: Sequence[Any], read: Any, row: jax.Array) -> Any:
        one = (row >= 0).astype(jnp.int32)  # which the compiler cannot infer
        once = lambda loop: (loop[0] + 1, step(loop[1][0], loop[1][1], read, row))
        start = jnp.int32(0), (through, groups)
        return jax.lax.while_loop(lambda loop: loop[0] < one, once, start)[1]

    return looped


def _bits(x: jax.Array) -> jax.Array:
    in_16_bits = x.dtype in (jnp.bfloat16, jnp.float16)
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if in_16_bits else x


def _run(
    steps: Mapping[int, Step],
    through: Any,
    groups: Sequence[Any],
    read: Any,
    *,
    cut: Cut,
    backwards: bool,
    apart: Callable[[Step], Step],
    carry: Callable[[jax.Array], jax.Array],
) -> tuple[Any, Sequence[Any]]:
    """See `run_through`; ``apart`` holds slices apart, arrays are carried as ``carry`` has them."""
    types = jax.tree.map(lambda x: x.dtype, (groups, read))
    groups, read = jax.tree.map(carry, (groups, read))

    def after(loop: Any, first: Any, rows: int) -> Any:
        through, groups = loop
        parts = jax.tree.map(lambda x: rows_of(x, first, rows, cut), (groups, read))
        written, only_read = jax.tree.map(_as, parts, types)
        through, new = apart(steps[rows])(through, written, only_read, first)
        put = lambda x, part: _put(x, carry(part), first, cut)
        return through, jax.tree.map(put, groups, new)

    def one(i: Any, loop: Any) -> Any:
        i = cut.full_slices - 1 - i if backwards else i
        return after(loop, (i * cut.rows).astype(jnp.int32), cut.rows)

    loop = jax.lax.fori_loop(0, cut.full_slices, one, (through, groups))
    if cut.rest:
        loop = after(loop, jnp.int32(cut.full_slices * cut.rows), cut.rest)
    return loop[0], jax.tree.map(_as, loop[1], types[0])


def _as(x: jax.Array, dtype: Any) -> jax.Array:
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def rows_of(x: jax.Array, first: Any, rows: int, cut: Cut) -> jax.Array:
    """The part of ``x`` that belongs to rows of the leaf."""
    split = _split(x, cut.shards)
    axis = split.ndim - x.ndim
    size = part_of(x.shape[0], rows, cut.size) // cut.shards
    part = jax.lax.dynamic_slice_in_dim(split, _start(first, x, cut), size, axis)
    return explicit_sharding.merge_axes(part, 0, 2) if axis else part


def _put(x: jax.Array, part: jax.Array, first: Any, cut: Cut) -> jax.Array:
    split, part = _split(x, cut.shards), _split(part, cut.shards)
    axis = split.ndim - x.ndim
    new = jax.lax.dynamic_update_slice_in_dim(split, part, _start(first, x, cut), axis)
    return explicit_sharding.merge_axes(new, 0, 2) if axis else new


def _split(x: jax.Array, shards: int) -> jax.Array:
    return x if shards == 1 else explicit_sharding.split_axis(x, 0, (x.shape[0] // shards,))


def _start(first: Any, x: jax.Array, cut: Cut) -> Any:
    """Where rows of the leaf from ``first`` on begin in ``x``, within each shard."""
    same = x.shape[0] == cut.size
    start = first if same else first // cut.rows * part_of(x.shape[0], cut.rows, cut.size)
    return start // cut.shards


def part_of(size: int, rows: int, of: int) -> int:
    """How much of an axis of ``size`` belongs to ``rows`` of a leaf's ``of``.

    Raises:
      ValueError: If that is not a whole number.
    """
    if size * rows % of:
        raise ValueError(f"an axis of {size} has no part for {rows} rows of {of}.")
    return size * rows // of
