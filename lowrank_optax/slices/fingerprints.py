"""Fingerprints of what a program computes: sizes of axes that stay are left out, all else counts.

The program for a slice of a leaf computes what that for the whole tree does, if it does not go by
the number of rows, by the place of the leaf among others, or by what these are.
"""

from collections.abc import Mapping, Sequence
import hashlib
from typing import Any

import jax
import numpy as np

from lowrank_optax.compat.jax import (
    ClosedJaxpr,
    Literal,
    branches,
    called_jaxpr,
    jaxpr_of,
    parameter,
    parameters,
    primitive_name,
    scan_operands,
    sub_jaxprs,
)

# Operations that change no number, and come and go with axes of size one.
ONLY_SHAPES = frozenset(("broadcast_in_dim", "reshape", "squeeze"))
# Parameters that are sizes, or say where an array lies.
ONLY_SIZES = frozenset(("mesh", "name", "out_sharding", "shape", "sharding"))
# Of starts, ends and sizes of parts of an axis the whole axis stands for itself.
OF_PARTS = frozenset(("limit_indices", "slice_sizes"))
# Operations along axes, whose sizes then count. Not "any of the layers", which is asked on purpose.
ALONG = ("reduce_", "arg", "cum", "sort")


def fingerprints(closed: ClosedJaxpr, inputs: Sequence[Any], known: Mapping[int, Any]) -> list[int]:
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
    look = lambda x: hash(repr(x.val)) if isinstance(x, Literal) else found[x]
    for equation in program.eqns:
        results = _of_equation(equation, [look(x) for x in equation.invars])
        found |= dict(zip(equation.outvars, results, strict=True))
    return [look(x) for x in program.outvars]


def _of_equation(equation: Any, operands: list[int]) -> list[int]:
    name = primitive_name(equation)
    if name in ONLY_SHAPES:
        return operands[:1]
    if name == "optimization_barrier":
        return operands
    if branched := branches(equation):
        of_branch = [_of_closed(x, operands[1:]) for x in branched]
        return [hash((operands[0], *each)) for each in zip(*of_branch, strict=True)]
    inner = called_jaxpr(equation)
    if inner is not None:
        return _of_closed(inner, operands)
    if name == "iota":
        return [hash(numbers_of(parameter(equation, "shape")[parameter(equation, "dimension")]))]
    inner = [x for program in sub_jaxprs(equation) for x in _of_body(program)]
    base = hash((name, *operands, *_asked(equation), *_sizes(equation), *inner))
    return [hash((base, i)) for i in range(len(equation.outvars))]


def _asked(equation: Any) -> list[str]:
    """The parameters of an operation."""
    # Of a batch of one, take_along_axis asks otherwise for the same.
    alike = ("dimension_numbers", "slice_sizes") if primitive_name(equation) == "gather" else ()
    found = []
    for name, value in sorted(parameters(equation).items()):
        if name in alike:
            continue
        if name in OF_PARTS:
            whole = equation.invars[0].aval.shape
            value = ["all" if x == size else x for x, size in zip(value, whole, strict=True)]
        loops_over_arrays = name == "length" and len(equation.invars) > sum(scan_operands(equation))
        if name not in ONLY_SIZES and not loops_over_arrays and not _has_program(value):
            found.append(f"{name}={value!r}")
    return found


def _has_program(value: Any) -> bool:
    values = value if isinstance(value, tuple | list) else [value]
    return any((callable(x) and not isinstance(x, type)) or hasattr(x, "jaxpr") for x in values)


def _sizes(equation: Any) -> list[int]:
    """Sizes of the axes that an operation works along."""
    name, shape = primitive_name(equation), ()
    if equation.invars:
        shape = equation.invars[0].aval.shape
    if name == "dot_general":
        return [shape[axis] for axis in parameter(equation, "dimension_numbers")[0][0]]
    if name == "reduce_or" or not name.startswith(ALONG):
        return []
    given = parameters(equation)
    axes = given.get("axes", given.get("axis", given.get("dimension", ())))
    return [shape[axis] for axis in np.atleast_1d(np.asarray(axes, int))]


def _of_closed(program: Any, operands: Sequence[int]) -> list[int]:
    consts = [hash(_of_constant(x)) for x in getattr(program, "consts", ())]
    return _results(jaxpr_of(program), [*consts, *operands])


def _of_body(program: Any) -> list[int]:
    """Of the body of a loop, say."""
    count = len(jaxpr_of(program).invars)
    return _of_closed(program, [hash(i) for i in range(count)])


def _of_constant(x: Any) -> Any:
    if isinstance(x, jax.core.Tracer):
        return id(x), np.shape(x)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.shape(x), hashlib.sha256(np.asarray(x).tobytes()).digest()
