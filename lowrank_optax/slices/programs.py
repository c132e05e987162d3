"""What reaches the results of a traced program, read from its operations; nothing is computed."""

from collections.abc import Callable, Mapping, Sequence
import functools
import hashlib
from typing import Any

import jax
import numpy as np

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
