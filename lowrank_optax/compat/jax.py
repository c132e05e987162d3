"""JAX's unstable interfaces: programs (jaxprs) and their operations, lowering, layouts, metadata.

Code elsewhere asks these functions instead of matching primitives and their parameters by name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
import functools
import itertools
from typing import Any, TypeVar

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import (
    ClosedJaxpr,
    DebugInfo,
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    jaxpr_as_fun,
)
from jax.interpreters import batching, mlir

# What is passed on; the functions below are this module's own.
__all__ = ["ClosedJaxpr", "Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var", "jaxpr_as_fun"]

T = TypeVar("T")

REMAT = ("checkpoint", "remat", "remat2")
# Operations that run one program, once, on their own operands.
CALLS = (
    *REMAT,
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "pjit",
    "xla_metadata_call",
)
# Parameters that hold programs with the results of their operation.
BODIES = ("jaxpr", "call_jaxpr", "branches")
RANDOM = ("random_bits", "threefry2x32")


def primitive_name(equation: JaxprEqn) -> str:
    """The name of an equation's operation."""
    return equation.primitive.name


def parameter(equation: JaxprEqn, name: str) -> Any:
    """A parameter of an equation's operation.

    Raises:
      NotImplementedError: If the operation has no such parameter in this version of JAX.
    """
    if name not in equation.params:
        raise NotImplementedError(
            f"{primitive_name(equation)} has no parameter {name} in jax {jax.__version__}; its "
            f"parameters are {', '.join(sorted(equation.params))}."
        )
    return equation.params[name]


def parameters(equation: JaxprEqn) -> Mapping[str, Any]:
    """All parameters of an equation's operation by name."""
    return equation.params


def shape_of(x: Var | Literal) -> tuple[int, ...]:
    """The shape of an operand or result."""
    return getattr(x.aval, "shape", ())


def jaxpr_of(program: Jaxpr | ClosedJaxpr) -> Jaxpr:
    """The program without its constants."""
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def is_program(x: Any) -> bool:
    """Whether a parameter of an operation is a program."""
    return isinstance(x, Jaxpr | ClosedJaxpr)


def new_jaxpr(
    inputs: Sequence[Var], outputs: Sequence[Any], equations: Sequence[JaxprEqn], name: str
) -> ClosedJaxpr:
    """A program without constants, made of equations of another."""
    argument_names = tuple(f"x{i}" for i in range(len(inputs)))
    result_names = tuple(f"y{i}" for i in range(len(outputs)))
    info = DebugInfo(name, name, argument_names, result_names)
    return ClosedJaxpr(Jaxpr([], [*inputs], [*outputs], [*equations], debug_info=info), [])


def sub_jaxprs(equation: JaxprEqn) -> Iterator[Jaxpr | ClosedJaxpr]:
    """All programs among the parameters of an operation, such as the bodies of a loop."""
    for value in equation.params.values():
        for x in value if isinstance(value, tuple | list) else [value]:
            if is_program(x):
                yield x


def bodies(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs whose results are the operation's: a called one, a scan's body, branches.

    A ``while``, which has no backward pass, has none.
    """
    for name in BODIES:
        value = equation.params.get(name, ())
        for program in value if isinstance(value, tuple | list) else [value]:
            if len(jaxpr_of(program).outvars) == len(equation.outvars):
                yield jaxpr_of(program)


def replace_bodies(equation: JaxprEqn, new: Callable[[Jaxpr], Jaxpr]) -> JaxprEqn:
    """The equation with each of its `bodies` replaced."""

    def replaced(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(map(replaced, value))
        program = jaxpr_of(value)
        if len(program.outvars) != len(equation.outvars):
            return value
        program = new(program)
        return ClosedJaxpr(program, value.consts) if isinstance(value, ClosedJaxpr) else program

    own = {name: replaced(equation.params[name]) for name in BODIES if name in equation.params}
    return equation.replace(params={**equation.params, **own})


def has_own_derivative(equation: JaxprEqn) -> bool:
    """Whether the operation is a ``jax.custom_jvp`` or ``custom_vjp``: its body is not derived."""
    return primitive_name(equation) in ("custom_jvp_call", "custom_vjp_call")


def called_jaxpr(equation: JaxprEqn) -> Jaxpr | ClosedJaxpr | None:
    """The program that an operation calls once, with its own operands and results; or None."""
    if primitive_name(equation) not in CALLS:
        return None
    for program in sub_jaxprs(equation):
        own = jaxpr_of(program)
        if len(own.invars) == len(equation.invars) and len(own.outvars) == len(equation.outvars):
            return program
    return None


def called_name(equation: JaxprEqn) -> str | None:
    """The name of the function that a ``jax.jit`` or ``jax.custom_jvp`` calls; else None."""
    if primitive_name(equation) in ("jit", "pjit"):
        return parameter(equation, "name")
    if primitive_name(equation) == "custom_jvp_call":
        return jaxpr_of(parameter(equation, "call_jaxpr")).debug_info.func_name
    return None


def bind(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation's operation on other operands."""
    results = equation.primitive.bind(*operands, **equation.params)
    return list(results) if equation.primitive.multiple_results else [results]


def context(equation: JaxprEqn) -> AbstractContextManager[None]:
    """The context that an equation was traced in, such as the mesh around it."""
    return equation.ctx.manager


def in_place_of(old: JaxprEqn, new: JaxprEqn, operands: Sequence[Var]) -> JaxprEqn:
    """An equation with these operands, and with the results, context and source of another."""
    return new.replace(
        invars=[*operands], outvars=old.outvars, source_info=old.source_info, ctx=old.ctx
    )


def branches(equation: JaxprEqn) -> Sequence[ClosedJaxpr]:
    """The branches of a ``cond``, whose first operand is the index; of other operations, none."""
    return parameter(equation, "branches") if primitive_name(equation) == "cond" else ()


def interpret(
    program: Jaxpr | ClosedJaxpr,
    inputs: Sequence[T],
    *,
    rule: Callable[[JaxprEqn, list[T]], Sequence[T]],
    constant: Callable[[Any], T],
    join: Callable[[T, Sequence[T]], T],
) -> list[T]:
    """Runs a program on values of another kind than arrays, such as what is known of arrays.

    Goes into called programs and branches, and passes on operands of optimization barriers.

    Args:
      program: The program.
      inputs: Values of its arguments.
      rule: From an operation and its operands' values to those of its results.
      constant: From an array in the program to its value.
      join: From the values of a ``cond``'s index, and of one result in each branch, to its value.
    """
    jaxpr = jaxpr_of(program)
    consts = program.consts if isinstance(program, ClosedJaxpr) else ()
    found = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
    found |= zip(jaxpr.invars, inputs, strict=True)
    look = lambda x: constant(x.val) if isinstance(x, Literal) else found[x]
    inside = functools.partial(interpret, rule=rule, constant=constant, join=join)
    for equation in jaxpr.eqns:
        operands = [look(x) for x in equation.invars]
        if branched := branches(equation):
            each = [inside(branch, operands[1:]) for branch in branched]
            results = [join(operands[0], of_result) for of_result in zip(*each, strict=True)]
        elif (called := called_jaxpr(equation)) is not None:
            results = inside(called, operands)
        elif primitive_name(equation) == "optimization_barrier":
            results = operands
        else:
            results = rule(equation, operands)
        found |= zip(equation.outvars, results, strict=True)
    return [look(x) for x in jaxpr.outvars]


def scan_operands(equation: JaxprEqn) -> tuple[int, int]:
    """How many operands of a ``scan`` are constants, and how many are carried.

    Raises:
      NotImplementedError: If this version of JAX describes it in an unknown way.
    """
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    if "ft_in" in params:  # jax 0.12: a tree of three parts, the third of what is scanned over
        operands = params["ft_in"].update(range(len(equation.invars)))
        consts, carried, _ = (len(list(part)) for part in operands.unpack())
        return consts, carried
    raise NotImplementedError(
        f"jax {jax.__version__} describes what a scan carries in an unknown way; its "
        f"parameters are {', '.join(sorted(params))}."
    )


def scan_length(equation: JaxprEqn) -> int:
    """How often a ``scan`` runs its body; 1 for other operations."""
    return parameter(equation, "length") if primitive_name(equation) == "scan" else 1


def is_remat(equation: JaxprEqn) -> bool:
    """Whether the operation is ``jax.checkpoint``."""
    return primitive_name(equation) in REMAT


def is_differentiated(equation: JaxprEqn) -> bool:
    """Whether a ``jax.checkpoint`` is one that a backward pass runs again."""
    return is_remat(equation) and parameter(equation, "differentiated")


def draws_random_bits(equation: JaxprEqn) -> bool:
    """Whether an operation draws random numbers, or runs a program that does."""
    inner = [x for program in sub_jaxprs(equation) for x in jaxpr_of(program).eqns]
    return primitive_name(equation) in RANDOM or any(map(draws_random_bits, inner))


def checkpoint_name(equation: JaxprEqn) -> str | None:
    """The name that ``jax.ad_checkpoint.checkpoint_name`` gives to an array; or None."""
    if primitive_name(equation) == "name":
        return parameter(equation, "name")
    return getattr(equation.params.get("_prim"), "name", None)  # jax 0.12


def is_on_host(x: Var | Literal) -> bool:
    """Whether a variable is in the memory of the host."""
    return getattr(x.aval, "memory_space", None) == jax.memory.Space.Host


def name_stack(equation: JaxprEqn) -> str:
    """The names around an equation: Linen's modules, ``jax.named_scope``, transformations."""
    return str(equation.source_info.name_stack)


def frames(equation: JaxprEqn) -> Iterator[tuple[str, str, int]]:
    """Where an equation comes from, innermost first: file, qualified function and line."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        yield frame.file_name, frame.function_name, frame.line_num


_traces = itertools.count()


def new_trace() -> int:
    """A number for `in_trace` that no other caller has."""
    return next(_traces)


def in_trace(number: int) -> Any:
    """A context in which jitted functions are traced unless they were within this number."""
    return set_xla_metadata(lowrank_optax_trace=str(number))


def in_default_layout(x: jax.Array) -> jax.Array:
    """``x`` stored in the order of its axes."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def set_lowering(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Lowers a primitive by ``rule(ctx, *operands, **params)``."""
    mlir.register_lowering(primitive, rule)


def set_batching(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Maps a primitive by ``rule(operands, axes, **params)``."""
    batching.primitive_batchers[primitive] = rule


def lower_jaxpr(ctx: Any, program: ClosedJaxpr, *operands: Any) -> Any:
    """The lowering of a program, within that of a primitive."""
    return mlir.lower_fun(jaxpr_as_fun(program), multiple_results=True)(ctx, *operands)


def single_platform(ctx: Any) -> str | None:
    """The platform lowered for, if it is one, and nothing is left to the partitioner; else None.

    Nothing is left where the program is of one device, or all axes of its mesh are manual.
    """
    platforms, axes = ctx.module_context.platforms, ctx.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        manual = axes.manual_axes | set(axes.mesh.manual_axes)
        alone = manual == frozenset(axes.mesh.axis_names)
    else:
        alone = not isinstance(axes, mlir.ShardingContext) or axes.num_devices == 1
    return platforms[0] if alone and len(platforms) == 1 else None
