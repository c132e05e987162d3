"""A program with its nonlinearities replaced by few-bit ones, equation by equation.

The program is a jaxpr, and stays the one that it is but for the equations that are replaced: those
of a nonlinearity become one call of `apply_few_bit`, which runs them.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, TypeAlias

import jax
from jax.extend import core

from lowrank_optax.activations import places
from lowrank_optax.activations.coded_backward import apply_few_bit
from lowrank_optax.activations.elementwise import Pieces, Var
from lowrank_optax.activations.known import Known
from lowrank_optax.activations.regions import Region, found_region
from lowrank_optax.activations.step_function import Codebook
from lowrank_optax.quantization.packing import PackingName

# Where the bodies of an equation are. Not those of a `while`: a loop that has no backward pass
# keeps nothing for it.
_BODIES = {
    "jit": "jaxpr",
    "scan": "jaxpr",
    "cond": "branches",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "shard_map": "jaxpr",
    "closed_call": "call_jaxpr",
    "xla_metadata_call": "jaxpr",
}


@dataclasses.dataclass(frozen=True)
class Site:
    """A nonlinearity in a program.

    Attributes:
      region: Its equations.
      known: Which it is.
      codebook: What stands in for its derivative.
      scope: The modules around, ``blocks/mlp``, as far as the program has names for them.
      source: The function and line that call it.
      x: Its operand, in the jaxpr where it is.
      y: Its result there.
      count: How often it runs: the product of the lengths of the scans around.
      remat: Whether it is inside a ``jax.checkpoint``.
    """

    region: Region
    known: Known
    codebook: Codebook
    scope: str
    source: str
    x: Var = dataclasses.field(repr=False)
    y: Var = dataclasses.field(repr=False)
    count: int = 1
    remat: bool = False


Choice: TypeAlias = Callable[[str, str], bool]  # of a scope and a source


@dataclasses.dataclass
class Rewriter:
    """Replaces nonlinearities in jaxprs.

    Attributes:
      functions: Which are looked for.
      book: The codebook for one of them.
      packing: Of the codes.
      chosen: Whether one in a scope, of a source, is replaced.
    """

    functions: tuple[Any, ...]
    book: Callable[[Known], Codebook]
    packing: PackingName
    chosen: Choice = lambda scope, source: True
    _done: dict[Any, tuple[core.Jaxpr, list[Site], core.Jaxpr]] = dataclasses.field(
        default_factory=dict
    )

    def closed(self, program: core.ClosedJaxpr) -> tuple[core.ClosedJaxpr, list[Site]]:
        """A whole program, and what was replaced in it."""
        jaxpr, sites = self._jaxpr(program.jaxpr, "")
        return core.ClosedJaxpr(jaxpr, program.consts), sites

    def _jaxpr(self, jaxpr: core.Jaxpr, scope: str) -> tuple[core.Jaxpr, list[Site]]:
        # Functions called several times stay one: their jaxpr is one object.
        key = id(jaxpr), scope
        if key not in self._done:
            self._done[key] = (*self._replaced(jaxpr, scope), jaxpr)  # keeps it, and so its id
        return self._done[key][:2]

    def _replaced(self, jaxpr: core.Jaxpr, scope: str) -> tuple[core.Jaxpr, list[Site]]:
        pieces = Pieces(jaxpr)
        needed = {x for x in jaxpr.outvars if not isinstance(x, core.Literal)}
        equations: list[core.JaxprEqn] = []
        sites: list[Site] = []
        # From the end, so that the last equation of a nonlinearity is met first, and those before
        # it are left out where nothing else needs them.
        for equation in reversed(jaxpr.eqns):
            if not equation.effects and needed.isdisjoint(equation.outvars):
                continue
            site = self._site(pieces, equation, scope)
            if site is not None:
                equation, found = self._call(site, equation), [site]
            else:
                equation, found = self._with_bodies(equation, scope)
            needed.update(x for x in equation.invars if not isinstance(x, core.Literal))
            equations.append(equation)
            sites = found + sites
        if not sites:
            return jaxpr, []
        return jaxpr.replace(eqns=equations[::-1]), sites

    def _site(self, pieces: Pieces, equation: core.JaxprEqn, scope: str) -> Site | None:
        if len(equation.outvars) != 1:
            return None
        (y,) = equation.outvars
        for x in pieces.roots(y):
            if x.aval != y.aval:
                continue
            found = found_region(pieces, x, y, self.functions)
            where = _joined(scope, places.modules(equation)), places.line(equation)
            if found is not None and self.chosen(*where):
                return Site(*found, self.book(found[1]), *where, x, y)
        return None

    def _call(self, site: Site, equation: core.JaxprEqn) -> core.JaxprEqn:
        """The equation that stands for those of a nonlinearity."""
        call = lambda x: apply_few_bit(site.region, site.codebook, self.packing, x)
        traced = jax.make_jaxpr(call)(site.x.aval)
        (made,) = traced.jaxpr.eqns
        return made.replace(
            invars=[site.x],
            outvars=[site.y],
            source_info=equation.source_info,
            ctx=equation.ctx,
        )

    def _with_bodies(self, equation: core.JaxprEqn, scope: str) -> tuple[core.JaxprEqn, list[Site]]:
        """An equation with nonlinearities replaced in the jaxprs inside."""
        name, params = equation.primitive.name, equation.params
        if name not in _BODIES or params.get("differentiated"):
            return equation, []
        inside = _joined(scope, places.modules(equation))
        value = params[_BODIES[name]]
        sites: list[Site] = []

        def body(old: Any) -> Any:
            new, found = self._jaxpr(getattr(old, "jaxpr", old), inside)
            sites.extend(found)
            return core.ClosedJaxpr(new, old.consts) if isinstance(old, core.ClosedJaxpr) else new

        new = tuple(map(body, value)) if isinstance(value, tuple) else body(value)
        if not sites:
            return equation, []
        times = params["length"] if name == "scan" else 1
        remat = name in ("checkpoint", "remat2")
        around = places.line(equation)
        moved = [
            dataclasses.replace(
                site,
                count=site.count * times,
                remat=site.remat or remat,
                source=site.source or around,
            )
            for site in sites
        ]
        return equation.replace(params={**params, _BODIES[name]: new}), moved


def _joined(*scopes: str) -> str:
    return "/".join(filter(None, scopes))
