"""Whether a program keeps the rows of arrays apart: read from its operations, nothing is run.

Each array of the program has one of four states. It has *rows*, each of which depends on the same
row of the inputs alone; it depends on no row, and is *alike* along its first axis, or differs along
it as a table does, *other*; or rows are *mixed* in it. What is not known to keep rows apart mixes
them. On the number of rows all of them may depend, which fingerprints see.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lowrank_optax.compat.jax import (
    Literal,
    branches,
    called_jaxpr,
    jaxpr_of,
    parameter,
    primitive_name,
)

ROWS, ALIKE, OTHER, MIXED = "rows", "alike", "other", "mixed"
# Number by number.
ELEMENTWISE = set(
    """
abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp
convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
integer_pow is_finite le lgamma log log1p log2 logistic lt max min mul ne neg nextafter not
one_minus_square or pow reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
    """.split()  # noqa: SIM905
)


def rows_are_apart(program: Any, inputs: Sequence[str]) -> list[str]:
    """The states of a program's results.

    Args:
      program: A jaxpr.
      inputs: The states of its inputs.
    """
    known = dict(zip(program.invars, inputs, strict=True))
    known |= {x: _free(x) for x in program.constvars}
    look = lambda x: ALIKE if isinstance(x, Literal) else known[x]
    for equation in program.eqns:
        states = [look(x) for x in equation.invars]
        results = [MIXED] * len(equation.outvars)
        if not equation.effects:
            results = _results(equation, states)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [look(x) for x in program.outvars]


def _free(x: Any) -> str:
    """Of what depends on no row: a number is alike in all of them."""
    return OTHER if x.aval.shape else ALIKE


def _results(equation: Any, states: list[str]) -> list[str]:
    name, count = primitive_name(equation), len(equation.outvars)
    if MIXED in states:
        return [MIXED] * count
    if name in ELEMENTWISE:
        return [_together(states)]
    if name == "optimization_barrier":
        return states
    if branched := branches(equation):
        if states[0] == ROWS:
            return [MIXED] * count
        found = [rows_are_apart(x.jaxpr, states[1:]) for x in branched]
        return [_together(each) for each in zip(*found, strict=True)]
    inner = called_jaxpr(equation)
    if inner is not None:
        return rows_are_apart(jaxpr_of(inner), states)
    if ROWS not in states:
        alike = name == "broadcast_in_dim" and _is_new_axis(equation)
        return [ALIKE if alike else _free(x) for x in equation.outvars]
    kept = KEEPING.get(name)
    return [ROWS if kept is not None and kept(equation, states) else MIXED] * count


def _together(states: Sequence[str]) -> str:
    """Of what is computed number by number from arrays of one shape, and from numbers."""
    if MIXED in states or (ROWS in states and OTHER in states):
        return MIXED
    return next((state for state in (ROWS, OTHER) if state in states), ALIKE)


def _is_new_axis(equation: Any) -> bool:
    """Whether the first axis is one that an array is repeated along."""
    axes = parameter(equation, "broadcast_dimensions")
    return 0 not in axes or equation.invars[0].aval.shape[axes.index(0)] == 1


def _first(equation: Any) -> tuple[int, int]:
    """Sizes of the first axes of operand and result."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return (before or (0,))[0], (after or (0,))[0]


def _reduces(equation: Any, states: list[str]) -> bool:
    return 0 not in parameter(equation, "axes")


def _along(name: str) -> Callable[[Any, list[str]], bool]:
    return lambda equation, states: parameter(equation, name) != 0 and OTHER not in states


def _reshapes(equation: Any, states: list[str]) -> bool:
    before, after = _first(equation)
    return before == after and parameter(equation, "dimensions") is None


def _broadcasts(equation: Any, states: list[str]) -> bool:
    before, after = _first(equation)
    return parameter(equation, "broadcast_dimensions")[:1] == (0,) and before == after


def _slices(equation: Any, states: list[str]) -> bool:
    before, after = _first(equation)
    strides = parameter(equation, "strides")
    return before == after and (strides is None or strides[0] == 1)


def _multiplies(equation: Any, states: list[str]) -> bool:
    (contracted, _), (left, right) = parameter(equation, "dimension_numbers")
    if left[:1] == (0,) and right[:1] == (0,):
        return OTHER not in states
    return states[0] == ROWS and states[1] != ROWS and not left and 0 not in contracted


# Operations that keep rows apart, if what is asked of them holds.
KEEPING: dict[str, Callable[[Any, list[str]], bool]] = {
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"), _reduces),
    **dict.fromkeys(("reduce_and", "reduce_or", "argmax", "argmin"), _reduces),
    **dict.fromkeys(("cumsum", "cummax", "cummin", "cumprod"), _along("axis")),
    "concatenate": _along("dimension"),
    "sort": _along("dimension"),
    "split": _along("axis"),
    "rev": lambda equation, states: 0 not in parameter(equation, "dimensions"),
    "broadcast_in_dim": _broadcasts,
    "dot_general": _multiplies,
    "reshape": _reshapes,
    "slice": _slices,
    "squeeze": lambda equation, states: 0 not in parameter(equation, "dimensions"),
    "transpose": lambda equation, states: parameter(equation, "permutation")[0] == 0,
    "pad": lambda equation, states: not any(parameter(equation, "padding_config")[0]),
}
