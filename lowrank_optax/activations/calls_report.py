"""Which nonlinearities of a program were found, what they save, and whether few bits pay there."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.activations.finding import Var
from lowrank_optax.activations.rewriting import Site
from lowrank_optax.compat import operations
from lowrank_optax.compat.jax import (
    Jaxpr,
    JaxprEqn,
    Literal,
    bodies,
    called_name,
    primitive_name,
    scan_operands,
)
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


class Users:
    """Who uses the arrays of a program, bodies included.

    Args:
      jaxpr: The program.
      trained: Its inputs that are differentiated.
    """

    def __init__(self, jaxpr: Jaxpr, trained: Iterable[Var]) -> None:
        self._of: dict[Var, list[tuple[JaxprEqn, int]]] = defaultdict(list)
        self._same: dict[Var, list[Var]] = defaultdict(list)  # across the walls of bodies
        self._seen: set[int] = set()
        self._visit(jaxpr)
        self._trained = self._reached(trained, linear=False)

    def savers(self, y: Var) -> tuple[str, ...]:
        """The kinds of operations that save ``y``, or a linear function of it."""
        found: dict[str, None] = {}
        for x in self._reached([y], linear=True):
            for equation, index in self._of[x]:
                kind = self._kind(equation, index)
                if kind is not None:
                    found[kind] = None
        return tuple(found)

    def _kind(self, equation: JaxprEqn, index: int) -> str | None:
        """What saves this operand; None if the operation does not."""
        if self._is_linear(equation, index) or any(bodies(equation)):
            return None
        if operations.is_product(equation):
            return "product" if self._others_vary(equation, index) else None
        if operations.is_multiplication(equation):
            return "multiplication"
        if not any(x in self._trained for x in equation.outvars):
            return None  # a comparison
        return called_name(equation) or primitive_name(equation)

    def _is_linear(self, equation: JaxprEqn, index: int) -> bool:
        return operations.is_linear_in(equation, index, self._others_vary(equation, index))

    def _others_vary(self, equation: JaxprEqn, index: int) -> bool:
        """Whether another operand depends on something trained."""
        others = [x for i, x in enumerate(equation.invars) if i != index]
        return any(x in self._trained for x in others if not isinstance(x, Literal))

    def _reached(self, start: Iterable[Var], linear: bool) -> dict[Var, None]:
        reached: dict[Var, None] = {}
        left = list(start)
        while left:
            x = left.pop()
            if x in reached:
                continue
            reached[x] = None
            left += self._same[x]
            for equation, index in self._of[x]:
                if not any(bodies(equation)) and (not linear or self._is_linear(equation, index)):
                    left += [x for x in equation.outvars if _is_floating(x)]
        return reached

    def _visit(self, jaxpr: Jaxpr) -> None:
        if id(jaxpr) in self._seen:
            return
        self._seen.add(id(jaxpr))
        for equation in jaxpr.eqns:
            for index, x in enumerate(equation.invars):
                if not isinstance(x, Literal):
                    self._of[x].append((equation, index))
            for body in bodies(equation):
                self._visit(body)
                self._connect(equation, body)

    def _connect(self, equation: JaxprEqn, body: Jaxpr) -> None:
        operands = equation.invars[len(equation.invars) - len(body.invars) :]
        pairs = [*zip(operands, body.invars, strict=True)]
        pairs += zip(body.outvars, equation.outvars, strict=True)
        if primitive_name(equation) == "scan":
            first, carried = scan_operands(equation)
            pairs += zip(body.outvars[:carried], body.invars[first : first + carried], strict=True)
        for outer, inner in pairs:
            if not isinstance(outer, Literal):
                self._same[outer].append(inner)


def _is_floating(x: Var) -> bool:
    dtype = getattr(x.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
