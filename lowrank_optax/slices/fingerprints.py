"""Fingerprints of what a program computes: equal for equal arithmetic, whatever the sizes.

The program for a slice of a leaf computes what that for the whole tree does, if it does not go by
the number of rows, by the place of the leaf among others, or by what these are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
import numpy as np

# Operations that change no number, and come and go with axes of size one.
ONLY_SHAPES = ("broadcast_in_dim", "reshape", "squeeze")
# What is asked of an operation, apart from sizes.
ASKED = ("axes", "axis", "dimension", "new_dtype", "permutation", "reverse")
# Constants up to this size are told apart by their numbers.
SMALL = 4096


def fingerprints(
    closed: core.ClosedJaxpr, inputs: Sequence[Any], known: Mapping[int, Any]
) -> list[int]:
    """The fingerprint of each result.

    Args:
      closed: The program.
      inputs: What each argument is, as anything that can be hashed.
      known: What constants are, by their ``id``. Whole numbers from zero on are `numbers_of`.
    """
    consts = [known[id(x)] if id(x) in known else _of_constant(x) for x in closed.consts]
    return _results(closed.jaxpr, [*map(hash, consts), *map(hash, inputs)])


def numbers_of(size: int) -> Any:
    """What the numbers of so many rows are, in order."""
    return "numbers", size


def _results(program: Any, inputs: Sequence[int]) -> list[int]:
    found = dict(zip([*program.constvars, *program.invars], inputs, strict=True))
    look = lambda x: hash(repr(x.val)) if isinstance(x, core.Literal) else found[x]
    for equation in program.eqns:
        results = _of_equation(equation, [look(x) for x in equation.invars])
        found |= dict(zip(equation.outvars, results, strict=True))
    return [look(x) for x in program.outvars]


def _of_equation(equation: Any, operands: list[int]) -> list[int]:
    name, parameters = equation.primitive.name, equation.params
    if name in ONLY_SHAPES:
        return operands[:1]
    if name == "optimization_barrier":
        return operands
    if name == "cond":
        of_branch = [_of_closed(x, operands[1:]) for x in parameters["branches"]]
        return [hash((operands[0], *each)) for each in zip(*of_branch, strict=True)]
    inner = called(equation)
    if inner is not None:
        return _of_closed(inner, operands)
    if name == "iota":
        return [hash(numbers_of(parameters["shape"][parameters["dimension"]]))]
    asked = repr([parameters.get(x) for x in ASKED])
    base = hash((name, *operands, asked, *_of_inner(equation)))
    return [hash((base, i)) for i in range(len(equation.outvars))]


def _of_closed(program: Any, operands: Sequence[int]) -> list[int]:
    consts = [hash(_of_constant(x)) for x in getattr(program, "consts", ())]
    return _results(getattr(program, "jaxpr", program), [*consts, *operands])


def _of_inner(equation: Any) -> list[int]:
    """Of the bodies of a loop, say."""
    found = []
    for value in equation.params.values():
        for x in value if isinstance(value, tuple | list) else [value]:
            program = getattr(x, "jaxpr", x)
            if hasattr(program, "eqns"):
                found += _of_closed(x, [hash(i) for i in range(len(program.invars))])
    return found


def called(equation: Any) -> Any:
    """The program that an equation calls once, with its own operands and results; or None."""
    if equation.primitive.name in ("scan", "while"):
        return None
    for value in equation.params.values():
        program = getattr(value, "jaxpr", value)
        if hasattr(program, "eqns") and len(program.invars) == len(equation.invars):
            return value if len(program.outvars) == len(equation.outvars) else None
    return None


def _of_constant(x: Any) -> Any:
    if isinstance(x, jax.core.Tracer) or np.size(x) > SMALL:
        return id(x), np.shape(x)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.shape(x), np.asarray(x).tobytes()
