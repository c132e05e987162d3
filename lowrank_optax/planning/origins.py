"""What makes an array of a jaxpr: its name, and the line of the program."""

from collections.abc import Iterator
import re
from typing import Any, NamedTuple

from jax.extend import core
import jax.numpy as jnp

from lowrank_optax.activations.rewriting import name_stack, source_frame
from lowrank_optax.compat.jax import scan_operands

# The same numbers in another shape, or the same array.
_VIEWS = (
    "copy",
    "expand_dims",
    "optimization_barrier",
    "reduce_precision",
    "reshape",
    "squeeze",
    "transpose",
)
# What runs other programs, and gives their results as its own.
_CALLS = (
    "checkpoint",
    "closed_call",
    "cond",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "remat2",
    "scan",
    "shard_map",
    "while",
    "xla_metadata_call",
)


class Origin(NamedTuple):
    """Where an array comes from.

    Attributes:
      name: That of ``checkpoint_name``; else the path of an input; else what computes it, as
        ``silu/logistic in MLP.__call__``: the primitive, within jitted functions, and the function
        of the program that calls these.
      source: Linen's modules and the line of the program: ``MLP/up decoder.py:55``.
      is_input: Whether it is an input of the whole program, in whatever shape.
      is_named: Whether ``checkpoint_name`` named it.
    """

    name: str
    source: str = ""
    is_input: bool = False
    is_named: bool = False


class _Source(NamedTuple):
    function: str = ""
    place: str = ""


class _Scope(NamedTuple):
    """The variables of one jaxpr.

    Attributes:
      made: The equation that makes a variable, and which of its results that is.
      inputs: What the others are: an origin, or a variable of the scope around this one.
      around: That scope.
      prefix: The names of the jitted functions around, each with a slash behind it.
      source: What of the program runs this jaxpr.
    """

    made: dict[Any, tuple[Any, int]]
    inputs: dict[Any, Any]
    around: "_Scope | None" = None
    prefix: str = ""
    source: _Source = _Source()


def origins(jaxpr: core.ClosedJaxpr, names: list[str]) -> list[Origin]:
    """Where each result of a jaxpr comes from.

    Looks through what only passes an array on, and into scans, loops, branches, jitted functions
    and ``jax.checkpoint``.

    Args:
      jaxpr: Of any function.
      names: Of its inputs, in their order.
    """
    inputs = [Origin(name, is_input=True) for name in names]
    made, inputs = _variables(jaxpr.jaxpr, inputs)
    return [_origin(x, _Scope(made, inputs)) for x in jaxpr.jaxpr.outvars]


def _variables(jaxpr: Any, inputs: list[Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    made = {x: (equation, i) for equation in jaxpr.eqns for i, x in enumerate(equation.outvars)}
    known = dict.fromkeys(jaxpr.constvars, Origin("constant", is_input=True))
    return made, known | dict(zip(jaxpr.invars, inputs, strict=True))


def _origin(x: Any, scope: _Scope) -> Origin:
    if isinstance(x, core.Literal):
        return Origin("constant", is_input=True)
    if x in scope.inputs:
        outer = scope.inputs[x]
        return outer if isinstance(outer, Origin) else _origin(outer, scope.around or scope)
    equation, index = scope.made[x]
    source = _source(equation, scope)
    if name := _checkpoint_name(equation):
        return Origin(name, source.place, is_named=True)
    primitive = equation.primitive.name
    if primitive in _VIEWS or _is_view(equation):
        return _origin(equation.invars[min(index, len(equation.invars) - 1)], scope)
    if primitive == "convert_element_type":
        operand = _origin(equation.invars[0], scope)
        if operand.is_input:
            dtype = jnp.dtype(equation.outvars[0].aval.dtype)
            return Origin(f"{operand.name} as {dtype}", source.place)
    found = [_inside(equation, inner, index, scope) for inner in _bodies(equation)]
    # A branch that is not taken gives zeros in the place of what the other one keeps.
    found.sort(key=lambda origin: (not origin.is_named, origin.is_input))
    called = f" in {source.function}" if source.function else ""
    return found[0] if found else Origin(f"{scope.prefix}{primitive}{called}", source.place)


def _inside(equation: Any, inner: Any, index: int, scope: _Scope) -> Origin:
    """Of a result of an equation that runs another jaxpr."""
    # Predicates and the like come first.
    operands: list[Any] = list(equation.invars[len(equation.invars) - len(inner.invars) :])
    source = _source(equation, scope)
    params, primitive = equation.params, equation.primitive.name
    consts, carried = scan_operands(equation) if primitive == "scan" else (0, 0)
    for i in range(carried):
        operands[consts + i] = Origin(f"scan carry in {source.function}", source.place)
    prefix = f"{scope.prefix}{params['name']}/" if primitive == "jit" else scope.prefix
    within = _Scope(*_variables(inner, operands), scope, prefix, source)
    origin = _origin(inner.outvars[index], within)
    if primitive == "scan" and index >= carried:
        # What each turn gives back is written once more, stacked.
        return origin._replace(is_input=False)
    return origin


def _bodies(equation: Any) -> Iterator[Any]:
    """The jaxprs in an equation whose results are its own."""
    if equation.primitive.name not in _CALLS:
        return
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(inner, "jaxpr", inner)
            if isinstance(jaxpr, core.Jaxpr) and len(jaxpr.outvars) == len(equation.outvars):
                yield jaxpr


def _is_view(equation: Any) -> bool:
    """Of a broadcast: that it repeats nothing, or a number, which no compiler stores."""
    if equation.primitive.name != "broadcast_in_dim":
        return False
    operand = equation.invars[0]
    return isinstance(operand, core.Literal) or operand.aval.size == equation.outvars[0].aval.size


def _checkpoint_name(equation: Any) -> str | None:
    params = equation.params
    if equation.primitive.name == "name":
        return params["name"]
    return getattr(params.get("_prim"), "name", None)


def _source(equation: Any, scope: _Scope) -> _Source:
    """What of the program an equation comes from."""
    found = source_frame(equation)
    if found is None:
        return scope.source
    function = re.sub(r"(\.<locals>\.<\w+>)+$", "", found[0]).rpartition("<locals>.")[2]
    return _Source(function, f"{name_stack(equation)} {found[1]}".strip())
