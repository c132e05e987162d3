"""Equations of a program that are one known nonlinearity."""

import dataclasses

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from lowrank_optax.activations.elementwise import Pieces, Var, evaluate
from lowrank_optax.activations.known import (
    POINTS,
    Functions,
    Known,
    candidates,
    distance,
    values_of,
)


@dataclasses.dataclass(frozen=True)
class Region:
    """Equations as a function of one array: equal if they, and their derivative, are the same.

    Attributes:
      text: The equations and those of the derivative.
      name: Of the nonlinearity.
      jaxpr: The equations.
    """

    text: str = dataclasses.field(repr=False)
    name: str
    jaxpr: core.ClosedJaxpr = dataclasses.field(compare=False, repr=False)

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, x: jax.Array) -> jax.Array:
        """What the equations make of ``x``."""
        return core.jaxpr_as_fun(self.jaxpr)(x)[0]


def found_region(
    pieces: Pieces, x: Var, y: Var, functions: Functions
) -> tuple[Region, Known] | None:
    """The equations from ``x`` to ``y``, and which of the functions they are, if one.

    It is one that has the same values and the same derivative in points on both sides of 0, and in
    0 itself.
    """
    values = pieces.values(x, y, POINTS)
    # What 16 bits make of a program's constants, and float32 of its own rounding.
    tolerance = 1e-2 if jnp.finfo(x.aval.dtype).bits == 16 else 1e-4
    near = [] if values is None else candidates(functions, values, tolerance)
    if not near:
        return None
    jaxpr = _closed(x, y, pieces.equations(x, y) or [])
    slope = _derivative(jaxpr)
    slopes = evaluate(
        [*slope.jaxpr.invars, *slope.jaxpr.constvars],
        [slope.jaxpr.outvars[0]],
        slope.jaxpr.eqns,
        [POINTS, np.ones_like(POINTS), *slope.consts],
    )
    for known in near:
        if slopes is not None and distance(slopes[0], values_of(known.fn)[1]) <= 2 * tolerance:
            return Region(f"{jaxpr}\n{slope}", known.name, jaxpr), known
    return None


def _closed(x: Var, y: Var, equations: list[core.JaxprEqn]) -> core.ClosedJaxpr:
    names = core.DebugInfo("few_bit", "few_bit", ("x",), ("result",))
    return core.ClosedJaxpr(core.Jaxpr([], [x], [y], equations, debug_info=names), [])


def _derivative(jaxpr: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The tangent of the result as a function of ``x`` and its tangent."""
    fn = core.jaxpr_as_fun(jaxpr)
    tangent = lambda x, t: jax.jvp(lambda x: fn(x)[0], (x,), (t,))[1]
    (aval,) = jaxpr.in_avals
    return jax.make_jaxpr(tangent)(aval, aval)
