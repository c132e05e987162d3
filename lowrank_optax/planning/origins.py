"""What makes an array of a jaxpr: its name, and the line of the program."""

import re
from typing import Any, NamedTuple

import jax.numpy as jnp

from lowrank_optax.activations.rewriting import scope_of, source_frame
from lowrank_optax.compat.jax import (
    ClosedJaxpr,
    Literal,
    bodies,
    called_name,
    checkpoint_name,
    primitive_name,
    scan_operands,
)
from lowrank_optax.compat.operations import is_conversion, is_view


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
    line: str = ""


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


def origins(jaxpr: ClosedJaxpr, names: list[str]) -> list[Origin]:
    """Where each result of a jaxpr comes from.

    Looks through what only passes an array on, and into scans, loops, branches, jitted functions
    and ``jax.checkpoint``.

    Args:
      jaxpr: Program of any function.
      names: Names of its inputs, in their order.
    """
    inputs = [Origin(name, is_input=True) for name in names]
    made, inputs = _variables(jaxpr.jaxpr, inputs)
    return [_origin(x, _Scope(made, inputs)) for x in jaxpr.jaxpr.outvars]


def _variables(jaxpr: Any, inputs: list[Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    made = {x: (equation, i) for equation in jaxpr.eqns for i, x in enumerate(equation.outvars)}
    known = dict.fromkeys(jaxpr.constvars, Origin("constant", is_input=True))
    return made, known | dict(zip(jaxpr.invars, inputs, strict=True))


def _origin(x: Any, scope: _Scope) -> Origin:
    if isinstance(x, Literal):
        return Origin("constant", is_input=True)
    if x in scope.inputs:
        outer = scope.inputs[x]
        return outer if isinstance(outer, Origin) else _origin(outer, scope.around or scope)
    equation, index = scope.made[x]
    source = _source(equation, scope)
    if name := checkpoint_name(equation):
        return Origin(name, source.line, is_named=True)
    if is_view(equation):
        return _origin(equation.invars[min(index, len(equation.invars) - 1)], scope)
    if is_conversion(equation):
        operand = _origin(equation.invars[0], scope)
        if operand.is_input:
            dtype = jnp.dtype(equation.outvars[0].aval.dtype)
            return Origin(f"{operand.name} as {dtype}", source.line)
    found = [_inside(equation, inner, index, scope) for inner in bodies(equation)]
    # A branch that is not taken gives zeros instead of what the other one saves.
    found.sort(key=lambda origin: (not origin.is_named, origin.is_input))
    called = f" in {source.function}" if source.function else ""
    name = f"{scope.prefix}{primitive_name(equation)}{called}"
    return found[0] if found else Origin(name, source.line)


def _inside(equation: Any, inner: Any, index: int, scope: _Scope) -> Origin:
    """The origin of a result of an equation that runs another jaxpr."""
    # Predicates and the like come first.
    operands: list[Any] = list(equation.invars[len(equation.invars) - len(inner.invars) :])
    source = _source(equation, scope)
    is_scan = primitive_name(equation) == "scan"
    consts, carried = scan_operands(equation) if is_scan else (0, 0)
    for i in range(carried):
        operands[consts + i] = Origin(f"scan carry in {source.function}", source.line)
    is_jit = primitive_name(equation) == "jit"
    prefix = f"{scope.prefix}{called_name(equation)}/" if is_jit else scope.prefix
    within = _Scope(*_variables(inner, operands), scope, prefix, source)
    origin = _origin(inner.outvars[index], within)
    if is_scan and index >= carried:
        # What each step returns is written once more, stacked.
        return origin._replace(is_input=False)
    return origin


def _source(equation: Any, scope: _Scope) -> _Source:
    """What of the program an equation comes from."""
    found = source_frame(equation)
    if found is None:
        return scope.source
    function = re.sub(r"(\.<locals>\.<\w+>)+$", "", found[0]).rpartition("<locals>.")[2]
    return _Source(function, f"{scope_of(equation)} {found[1]}".strip())
