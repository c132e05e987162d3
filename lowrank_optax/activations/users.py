"""What a program does with an array: whether an operation behind it keeps it for backward."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from jax.extend import core
import jax.numpy as jnp

from lowrank_optax.activations.elementwise import Var
from lowrank_optax.compat.jax import scan_operands

# Linear in their operands, so that they keep none of them.
_PASSING_ON = """add add_any all_gather broadcast_in_dim concatenate convert_element_type copy
copy_p cumsum dynamic_slice dynamic_update_slice expand_dims gather name neg optimization_barrier
pad pcast psum psum2 psum_invariant pvary reduce_scatter reduce_sum reshape reshard rev select_n
sharding_constraint slice squeeze sub transpose"""
_LINEAR = frozenset(_PASSING_ON.split())
_PRODUCTS = frozenset(["dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot"])
_BODIES = ("jaxpr", "call_jaxpr", "branches")


class Users:
    """Who uses the arrays of a program, bodies included.

    Args:
      jaxpr: The program.
      trained: Its inputs that are differentiated.
    """

    def __init__(self, jaxpr: core.Jaxpr, trained: Iterable[Var]) -> None:
        self._of: dict[Var, list[tuple[core.JaxprEqn, int]]] = defaultdict(list)
        self._same: dict[Var, list[Var]] = defaultdict(list)  # across the walls of bodies
        self._seen: set[int] = set()
        self._visit(jaxpr)
        self._trained = self._reached(trained, linear=False)

    def keepers(self, y: Var) -> tuple[str, ...]:
        """The kinds of operations that keep ``y``, or a linear function of it."""
        found: dict[str, None] = {}
        for x in self._reached([y], linear=True):
            for equation, place in self._of[x]:
                kind = self._kind(equation, place)
                if kind is not None:
                    found[kind] = None
        return tuple(found)

    def _kind(self, equation: core.JaxprEqn, place: int) -> str | None:
        """What keeps the operand in this place; None if the operation does not."""
        name = equation.primitive.name
        if self._is_linear(equation, place) or any(_bodies(equation)):
            return None
        if name in _PRODUCTS:
            return "product" if self._others_vary(equation, place) else None
        if name == "mul":
            return "multiplication"
        if not any(x in self._trained for x in equation.outvars):
            return None  # a comparison
        return str(equation.params.get("name", name))

    def _is_linear(self, equation: core.JaxprEqn, place: int) -> bool:
        name = equation.primitive.name
        if name == "mul" or (name == "div" and place == 0):
            return not self._others_vary(equation, place)  # numbers, and the masks of dropout
        if name in ("select_n", "dynamic_slice", "gather", "dynamic_update_slice"):
            return place > 0 if name == "select_n" else place < 2  # not indices and the like
        return name in _LINEAR

    def _others_vary(self, equation: core.JaxprEqn, place: int) -> bool:
        """Whether something trained is in the operands in other places."""
        others = [x for i, x in enumerate(equation.invars) if i != place]
        return any(x in self._trained for x in others if not isinstance(x, core.Literal))

    def _reached(self, start: Iterable[Var], linear: bool) -> dict[Var, None]:
        reached: dict[Var, None] = {}
        left = list(start)
        while left:
            x = left.pop()
            if x in reached:
                continue
            reached[x] = None
            left += self._same[x]
            for equation, place in self._of[x]:
                if not any(_bodies(equation)) and (not linear or self._is_linear(equation, place)):
                    left += [x for x in equation.outvars if _is_floating(x)]
        return reached

    def _visit(self, jaxpr: core.Jaxpr) -> None:
        if id(jaxpr) in self._seen:
            return
        self._seen.add(id(jaxpr))
        for equation in jaxpr.eqns:
            for place, x in enumerate(equation.invars):
                if not isinstance(x, core.Literal):
                    self._of[x].append((equation, place))
            for body in _bodies(equation):
                self._visit(body)
                self._connect(equation, body)

    def _connect(self, equation: core.JaxprEqn, body: core.Jaxpr) -> None:
        operands = equation.invars[len(equation.invars) - len(body.invars) :]
        pairs = [*zip(operands, body.invars, strict=True)]
        pairs += zip(body.outvars, equation.outvars, strict=True)
        if equation.primitive.name == "scan":
            first, carried = scan_operands(equation)
            pairs += zip(body.outvars[:carried], body.invars[first : first + carried], strict=True)
        for outer, inner in pairs:
            if not isinstance(outer, core.Literal):
                self._same[outer].append(inner)


def _is_floating(x: Var) -> bool:
    dtype = getattr(x.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _bodies(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The jaxprs in an equation whose operands and results are its own."""
    for key in _BODIES:
        value: Any = equation.params.get(key, ())
        for inner in value if isinstance(value, tuple) else (value,):
            jaxpr = getattr(inner, "jaxpr", inner)
            if isinstance(jaxpr, core.Jaxpr) and len(jaxpr.outvars) == len(equation.outvars):
                yield jaxpr
