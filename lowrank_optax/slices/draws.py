"""Random numbers that do not depend on the slice, drawn once before the loop.

A random basis is drawn from one seed wherever it is used. Compilers take no draw out of a loop.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

DRAWS = ("random_bits", "threefry2x32")


def drawn_before(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """The function for arguments of these types, traced, and what it draws in any case drawn."""
    traced, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
    program = traced.jaxpr
    known = set(program.constvars)
    before, drawn = [], []
    for equation in program.eqns:
        if not equation.effects and all(
            isinstance(x, core.Literal) or x in known for x in equation.invars
        ):
            known.update(equation.outvars)
            before.append(equation)
            if _draws(equation):
                drawn.append(equation)
    outside = [x for equation in drawn for x in equation.outvars]
    rest = [equation for equation in program.eqns if equation not in drawn]
    first = _called(program, program.constvars, before, outside)
    then = _called(program, [*program.constvars, *outside, *program.invars], rest, program.outvars)
    numbers = first(*traced.consts) if drawn else []

    def of_slice(*arguments: Any) -> Any:
        results = then(*traced.consts, *numbers, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(result), results)

    return of_slice


def _called(
    program: Any, inputs: Sequence[Any], equations: Sequence[Any], results: Sequence[Any]
) -> Callable[..., list[jax.Array]]:
    """Some of a program's equations, as a function of these inputs."""
    part = program.replace(constvars=[], invars=inputs, eqns=equations, outvars=results)
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, []))


def _draws(equation: Any) -> bool:
    """Whether an equation draws random numbers, or calls a program that does."""
    inner = [getattr(value, "jaxpr", None) for value in equation.params.values()]
    called = [x for program in inner for x in getattr(program, "eqns", ())]
    return equation.primitive.name in DRAWS or any(map(_draws, called))
