"""Which nonlinearities of a program were found, what they save, and whether few bits pay there."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp

from lowrank_optax.activations.finding import Var
from lowrank_optax.activations.rewriting import Site
from lowrank_optax.compat.jax import scan_operands
from lowrank_optax.modules.report import Report, Table


class CallsRow(NamedTuple):
    """A nonlinearity that is called in one place.

    Attributes:
      function: Its name, with options that are not the default: ``leaky_relu(negative_slope=0.2)``.
      shape: Shape of the operand, in one step of a scan, and for one example of a ``vmap``.
      dtype: Dtype of the operand.
      scope: The modules around (of Linen, or ``jax.named_scope``): ``blocks/mlp``; else "".
      source: The function and line: ``MLP.__call__ decoder.py:55``.
      count: How often it is called, scans unrolled.
      bytes_now: Bytes that all these calls save for the backward pass with the plain function:
        those that ``jax.vjp`` saves for it alone.
      bytes_then: Bytes that they save with the few-bit function.
      saved_for: Operations that save the value after it, or a linear function of that, whatever
        the nonlinearity saves: ``product`` with something trained, ``multiplication`` by it, or the
        name of another function.
      remat: Whether it is inside ``jax.checkpoint``, whose policy then decides what is saved.
    """

    function: str
    shape: tuple[int, ...]
    dtype: str
    scope: str
    source: str
    count: int
    bytes_now: int
    bytes_then: int
    saved_for: tuple[str, ...]
    remat: bool


class CallsReport(Report):
    """Prints as a table of `CallsRow`, with what to make of it below.

    Attributes:
      rows: One row for each place that calls a nonlinearity, in the program's order.
      bytes_now: Sum over the rows.
      bytes_then: Sum over the rows.
    """

    def __init__(self, rows: Sequence[CallsRow]) -> None:
        self.rows = tuple(rows)
        self.bytes_now = sum(row.bytes_now for row in rows)
        self.bytes_then = sum(row.bytes_then for row in rows)

    @property
    def advice(self) -> str:
        """Where few bits pay, and where they do not."""
        sentences = []
        saved = sum(row.count for row in self.rows if row.saved_for)
        calls = sum(row.count for row in self.rows)
        if saved:
            sentences.append(
                f"After {saved} of {calls} calls the value is saved anyway, for a later operation: "
                "few bits save no more memory there than recomputing the nonlinearity does."
            )
        if saved < calls:
            sentences.append(
                f"After {calls - saved} of {calls} calls nothing saves the value: few bits pay."
            )
        if any(row.remat for row in self.rows):
            sentences.append(
                "Inside jax.checkpoint the policy decides what is saved: "
                "save_only_these_names('few_bit_codes') saves the codes."
            )
        sentences.append(
            "Measure the compiled peak: lro.planning.saved_residuals(loss, model, ...)."
        )
        return "\n".join(sentences)

    def table(self) -> Table:
        """Columns, rows, footer and notes."""
        columns = ("function", "operand", ">times", "where", ">bytes now", ">bytes then")
        rows = [
            (
                row.function,
                f"{row.dtype} {' × '.join(map(str, row.shape))}",
                row.count,
                f"{row.scope} {row.source}".strip(),
                row.bytes_now,
                row.bytes_then,
                ", ".join(row.saved_for) or None,
            )
            for row in self.rows
        ]
        footer = [("total", "", "", "", self.bytes_now, self.bytes_then, "")]
        return Table((*columns, "saved anyway for"), rows, footer, self.advice)


def calls_report(sites: Sequence[Site], users: "Users") -> CallsReport:
    """The report on what was found in a program."""
    rows: dict[Any, CallsRow] = {}
    for site in sites:
        row = CallsRow(
            str(site.known),
            tuple(site.x.aval.shape),
            str(site.x.aval.dtype),
            site.scope,
            site.source,
            site.count,
            site.count * _saved_bytes(site.few.fn, site.x.aval),
            site.count * _saved_bytes(site.few, site.x.aval),
            users.savers(site.y),
            site.remat,
        )
        key = row._replace(count=0, bytes_now=0, bytes_then=0)
        before = rows.get(key)
        if before is not None:  # another layer that is called in the same line
            row = row._replace(
                count=row.count + before.count,
                bytes_now=row.bytes_now + before.bytes_now,
                bytes_then=row.bytes_then + before.bytes_then,
            )
        rows[key] = row
    return CallsReport(tuple(rows.values()))


def _saved_bytes(fn: Callable[[jax.Array], jax.Array], aval: Any) -> int:
    """Bytes that a function of one array saves for its backward pass."""
    x = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    saved = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(fn, x)[1], x))
    bits = (math.prod(part.shape) * jax.dtypes.itemsize_bits(part.dtype) for part in saved)
    return sum(-(-count // 8) for count in bits)


# Linear in their operands, so that they save none of them.
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

    def savers(self, y: Var) -> tuple[str, ...]:
        """The kinds of operations that save ``y``, or a linear function of it."""
        found: dict[str, None] = {}
        for x in self._reached([y], linear=True):
            for equation, place in self._of[x]:
                kind = self._kind(equation, place)
                if kind is not None:
                    found[kind] = None
        return tuple(found)

    def _kind(self, equation: core.JaxprEqn, place: int) -> str | None:
        """What saves this operand; None if the operation does not."""
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
