"""A program with few-bit calls instead of the known nonlinearities in it.

All other equations stay as they are, and functions that are called several times stay one.
"""

from collections.abc import Callable
import dataclasses
from pathlib import Path
import re
from typing import Any

import jax

from lowrank_optax.activations.coded_backward import FewBit, Pointwise
from lowrank_optax.activations.finding import Finder, Functions, Known, Var
from lowrank_optax.compat.jax import (
    Jaxpr,
    JaxprEqn,
    Literal,
    context,
    frames,
    has_own_derivative,
    in_place_of,
    is_differentiated,
    is_remat,
    name_stack,
    replace_bodies,
    scan_length,
)

# What of JAX, Flax and this library calls the lines of a model.
_LIBRARIES = re.compile(
    r"[/\\](jax|flax|lowrank_optax[/\\](activations|layers|adapters|modules|planning))[/\\]"
)


@dataclasses.dataclass(frozen=True)
class Site:
    """A nonlinearity in a program.

    Attributes:
      known: Which it is.
      few: What replaces its equations, and runs them in the forward pass.
      scope: The modules around, ``blocks/mlp``, as far as the program has names for them.
      source: The function and line that call it.
      x: Its operand, in the jaxpr where it is.
      y: Its result there.
      count: How often it runs: the product of the lengths of the scans around.
      remat: Whether it is inside a ``jax.checkpoint``.
    """

    known: Known
    few: FewBit
    scope: str
    source: str
    x: Var = dataclasses.field(repr=False)
    y: Var = dataclasses.field(repr=False)
    count: int = 1
    remat: bool = False


class Rewriter:
    """Replaces nonlinearities in jaxprs.

    Args:
      functions: Which are looked for.
      few: From one of them, and the equations that compute it, to its few-bit version.
      chosen: Whether one in a scope, of a source, is replaced.
    """

    def __init__(
        self,
        functions: Functions,
        few: Callable[[Known, Pointwise], FewBit],
        chosen: Callable[[str, str], bool],
    ) -> None:
        self._finder, self._few, self._chosen = Finder(functions), few, chosen
        self._done: dict[Any, tuple[Jaxpr, list[Site], Jaxpr]] = {}

    def rewrite(self, jaxpr: Jaxpr, scope: str = "") -> tuple[Jaxpr, list[Site]]:
        """The jaxpr with few-bit calls, and the nonlinearities that were found in it."""
        key = id(jaxpr), scope
        if key not in self._done:
            self._done[key] = (*self._rewrite(jaxpr, scope), jaxpr)  # keeps it, and so its id
        return self._done[key][:2]

    def _rewrite(self, jaxpr: Jaxpr, scope: str) -> tuple[Jaxpr, list[Site]]:
        made = {x: equation for equation in jaxpr.eqns for x in equation.outvars}
        needed = {x for x in jaxpr.outvars if not isinstance(x, Literal)}
        equations: list[JaxprEqn] = []
        sites: list[Site] = []
        # From the end, so that the last equation of a nonlinearity is met first, and those before
        # it are left out where nothing else needs them.
        for equation in reversed(jaxpr.eqns):
            if not equation.effects and needed.isdisjoint(equation.outvars):
                continue
            inner_scope = "/".join(filter(None, (scope, scope_of(equation))))
            where = inner_scope, source_line(equation)
            with context(equation):  # the mesh around
                found = self._finder.find(made, equation)
            if found is not None and self._chosen(*where):
                known, fn, x = found
                site = Site(known, self._few(known, fn), *where, x, equation.outvars[0])
                with context(equation):
                    (call,) = jax.make_jaxpr(site.few)(x.aval).jaxpr.eqns
                equation, inside = in_place_of(equation, call, [x]), [site]
            else:
                equation, inside = self._with_bodies(equation, *where)
            needed.update(x for x in equation.invars if not isinstance(x, Literal))
            equations.append(equation)
            sites = inside + sites
        return (jaxpr.replace(eqns=equations[::-1]) if sites else jaxpr), sites

    def _with_bodies(
        self, equation: JaxprEqn, scope: str, source: str
    ) -> tuple[JaxprEqn, list[Site]]:
        """An equation with nonlinearities replaced in the jaxprs inside."""
        if has_own_derivative(equation) or is_differentiated(equation):
            return equation, []
        sites: list[Site] = []

        def body(old: Jaxpr) -> Jaxpr:
            new, found = self.rewrite(old, scope)
            sites.extend(found)
            return new

        new = replace_bodies(equation, body)
        if not sites:
            return equation, []
        times, remat = scan_length(equation), is_remat(equation)
        return new, [
            dataclasses.replace(
                site,
                count=site.count * times,
                remat=site.remat or remat,
                source=site.source or source,
            )
            for site in sites
        ]


def scope_of(equation: JaxprEqn) -> str:
    """The names around it, ``blocks/mlp``: Linen's modules, and those of ``jax.named_scope``."""
    return re.sub(r"\w+\(([^()]*)\)", r"\1", name_stack(equation)).strip("/")


def source_line(equation: JaxprEqn) -> str:
    """The function and line of the program: ``MLP.__call__ decoder.py:55``; "" if not known."""
    found = source_frame(equation)
    return "" if found is None else f"{found[0].partition('.<locals>')[0]} {found[1]}"


def source_frame(equation: JaxprEqn) -> tuple[str, str] | None:
    """The function, with those it is defined in, and ``decoder.py:55``; None if not known."""
    for file, function, line in frames(equation):
        if not _LIBRARIES.search(file):
            return function, f"{Path(file).name}:{line}"
    return None
