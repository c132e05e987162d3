"""What the operations of a traced program do, by their names and parameters in JAX."""

from collections.abc import Sequence
import operator
from typing import Any

import numpy as np

from lowrank_optax.compat.jax import (
    JaxprEqn,
    Literal,
    is_program,
    parameter,
    parameters,
    primitive_name,
    scan_operands,
    shape_of,
)

ELEMENTWISE = frozenset(
    """
abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp
convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
integer_pow is_finite le lgamma log log1p log2 logistic lt max min mul ne neg nextafter not
one_minus_square or pow reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
    """.split()  # noqa: SIM905
)
# Operations along axes; of their other axes each slice gets what it gets alone.
ALONG_AXES = frozenset(
    """
argmax argmin concatenate cummax cummin cumprod cumsum reduce_and reduce_max reduce_min reduce_or
reduce_prod reduce_sum rev sort split squeeze
    """.split()  # noqa: SIM905
)
# Linear in each operand, so that none is saved for the backward pass.
LINEAR = frozenset(
    """
add add_any all_gather broadcast_in_dim concatenate convert_element_type copy copy_p cumsum
dynamic_slice dynamic_update_slice expand_dims gather name neg optimization_barrier pad pcast psum
psum2 psum_invariant pvary reduce_scatter reduce_sum reshape reshard rev select_n
sharding_constraint slice squeeze sub transpose
    """.split()  # noqa: SIM905
)
# The same numbers in another shape, or the same array.
VIEWS = frozenset(
    """
copy device_put expand_dims optimization_barrier reduce_precision reshape squeeze stop_gradient
transpose
    """.split()  # noqa: SIM905
)
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot")
# Parameters that are sizes, or say where an array lies.
ONLY_SIZES = frozenset(("mesh", "name", "out_sharding", "shape", "sharding"))


def is_elementwise(equation: JaxprEqn) -> bool:
    """Whether each number of the result is computed from those at the same index alone."""
    return primitive_name(equation) in ELEMENTWISE


def is_only_reshaped(equation: JaxprEqn) -> bool:
    """Whether no number is changed: axes of size one come and go, or the array is moved."""
    return primitive_name(equation) in ("broadcast_in_dim", "reshape", "reshard", "squeeze")


def is_passed_on(equation: JaxprEqn) -> bool:
    """Whether the result is the operand, repeated or with another sharding."""
    return primitive_name(equation) in ("broadcast_in_dim", "pcast", "pvary", "reshard")


def is_view(equation: JaxprEqn) -> bool:
    """Whether no compiler stores the result beside its operand, in the same memory.

    Of broadcasts, those that repeat nothing, and those of a number.
    """
    if primitive_name(equation) != "broadcast_in_dim":
        return primitive_name(equation) in VIEWS
    operand = equation.invars[0]
    sizes = (np.prod(shape_of(x)) for x in (operand, equation.outvars[0]))
    return isinstance(operand, Literal) or operator.eq(*sizes)


def is_conversion(equation: JaxprEqn) -> bool:
    """Whether the operation converts an array to another dtype."""
    return primitive_name(equation) == "convert_element_type"


def is_product(equation: JaxprEqn) -> bool:
    """Whether the operation multiplies matrices, or convolves."""
    return primitive_name(equation) in PRODUCTS


def is_multiplication(equation: JaxprEqn) -> bool:
    """Whether the operation multiplies elementwise."""
    return primitive_name(equation) == "mul"


def is_linear_in(equation: JaxprEqn, index: int, others_vary: bool) -> bool:
    """Whether the result is linear in an operand, so that the backward pass does not need it.

    Args:
      equation: The operation.
      index: Which operand.
      others_vary: Whether another operand is differentiated too.
    """
    name = primitive_name(equation)
    if name == "mul" or (name == "div" and index == 0):
        return not others_vary  # numbers, and the masks of dropout
    if name == "select_n":
        return index > 0
    if name in ("dynamic_slice", "gather", "dynamic_update_slice"):
        return index < 2  # the others are indices
    return name in LINEAR


def iota_size(equation: JaxprEqn) -> int | None:
    """How far an ``iota`` counts; None for other operations."""
    if primitive_name(equation) != "iota":
        return None
    return parameter(equation, "shape")[parameter(equation, "dimension")]


def sizes_along(equation: JaxprEqn) -> list[int]:
    """Sizes of the axes that a reduction, accumulation, sort or product works along.

    Not those of "any of them", which is asked on purpose of layers that are the same.
    """
    name = primitive_name(equation)
    if name == "dot_general":
        axes = parameter(equation, "dimension_numbers")[0][0]
    elif name.startswith(("reduce_", "arg", "cum", "sort")) and name != "reduce_or":
        axes = _axes(equation)
    else:
        return []
    return [shape_of(equation.invars[0])[axis] for axis in axes]


def settings(equation: JaxprEqn) -> list[str]:
    """The parameters, as text, but for programs, shardings and what goes by whole axes' sizes."""
    # take_along_axis of a batch of one has other parameters for the same.
    ignored = ("dimension_numbers", "slice_sizes") if primitive_name(equation) == "gather" else ()
    loops_over_arrays = primitive_name(equation) == "scan" and len(equation.invars) > sum(
        scan_operands(equation)
    )
    found = []
    for name, value in sorted(parameters(equation).items()):
        if name in ignored or name in ONLY_SIZES or (name == "length" and loops_over_arrays):
            continue
        if name in ("limit_indices", "slice_sizes"):
            whole = shape_of(equation.invars[0])
            value = ["all" if x == size else x for x, size in zip(value, whole, strict=True)]
        values = value if isinstance(value, tuple | list) else [value]
        if not any(is_program(x) or _is_function(x) for x in values):
            found.append(f"{name}={value!r}")
    return found


def row_operands(equation: JaxprEqn) -> Sequence[int]:
    """The operands whose rows, along the first axis, become the same rows of the results.

    Empty if rows are mixed or moved, or that is not known. Rows of other operands are mixed.
    """
    name, every = primitive_name(equation), range(len(equation.invars))
    if name in ELEMENTWISE:
        return every
    if name in ALONG_AXES:
        return () if 0 in _axes(equation) else every
    if name == "dot_general":
        (contracted, _), (left, right) = parameter(equation, "dimension_numbers")
        if left[:1] == (0,) and right[:1] == (0,):
            return every
        return (0,) if not left and 0 not in contracted else ()
    if name == "transpose":
        return every if parameter(equation, "permutation")[0] == 0 else ()
    if name == "pad":
        return () if any(parameter(equation, "padding_config")[0]) else every
    before, after = shape_of(equation.invars[0])[:1], shape_of(equation.outvars[0])[:1]
    if before != after or not before:
        return ()
    if name == "reshape":
        return every if parameter(equation, "dimensions") is None else ()
    if name == "broadcast_in_dim":
        return every if parameter(equation, "broadcast_dimensions")[:1] == (0,) else ()
    if name == "slice":
        strides = parameter(equation, "strides")
        return every if strides is None or strides[0] == 1 else ()
    return ()


def repeats_rows(equation: JaxprEqn) -> bool:
    """Whether all rows of the result are one, repeated."""
    if primitive_name(equation) != "broadcast_in_dim":
        return False
    axes = parameter(equation, "broadcast_dimensions")
    return 0 not in axes or shape_of(equation.invars[0])[axes.index(0)] == 1


def _axes(equation: JaxprEqn) -> list[int]:
    names = ("axes", "axis", "dimension", "dimensions")
    given = [x for name, x in parameters(equation).items() if name in names]
    return np.atleast_1d(np.asarray(given[0] if given else (), int)).tolist()


def _is_function(x: Any) -> bool:
    return callable(x) and not isinstance(x, type)
