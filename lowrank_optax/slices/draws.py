"""Random numbers that do not depend on the slice, drawn once before the loop.

A random basis is drawn from one seed wherever it is used. Compilers take no draw out of a loop.
"""

from collections.abc import Callable
from typing import Any

import jax

from lowrank_optax.compat.jax import Literal, draws_random_bits, jaxpr_as_fun, new_jaxpr


def drawn_before(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """The function for arguments of these types, traced, and what it draws in any case drawn."""
    traced, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
    program = traced.jaxpr
    known = set(program.constvars)
    before, drawn = [], []
    for equation in program.eqns:
        if not equation.effects and all(
            isinstance(x, Literal) or x in known for x in equation.invars
        ):
            known.update(equation.outvars)
            before.append(equation)
            if draws_random_bits(equation):
                drawn.append(equation)
    outside = [x for equation in drawn for x in equation.outvars]
    rest = [equation for equation in program.eqns if equation not in drawn]
    part = lambda *of: jaxpr_as_fun(new_jaxpr(*of, name="slice"))
    first = part(program.constvars, outside, before)
    then = part([*program.constvars, *outside, *program.invars], program.outvars, rest)
    numbers = first(*traced.consts) if drawn else []

    def of_slice(*arguments: Any) -> Any:
        results = then(*traced.consts, *numbers, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(result), results)

    return of_slice
