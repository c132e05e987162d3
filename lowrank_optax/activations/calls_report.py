"""Which nonlinearities of a program were found, what they keep, and whether few bits pay there."""

from collections.abc import Callable, Sequence
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from lowrank_optax.activations.coded_backward import apply_few_bit
from lowrank_optax.activations.rewriting import Site
from lowrank_optax.activations.users import Users
from lowrank_optax.matrices.printing import printed
from lowrank_optax.quantization.packing import PackingName

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("function", "operand", "times", "where", "kept now", "kept then", "kept anyway for")


class CallsRow(NamedTuple):
    """A nonlinearity that is called in one place.

    Attributes:
      function: Its name, with options that are not the default: ``leaky_relu(negative_slope=0.2)``.
      shape: Of the operand, in one turn of a scan, and for one example of a ``vmap``.
      dtype: Likewise.
      scope: The modules around (of Linen, or ``jax.named_scope``): ``blocks/mlp``; else "".
      source: The function and line: ``MLP.__call__ decoder.py:55``.
      count: How often it is called, scans unrolled.
      bytes_now: What backward keeps of all these calls with the plain function: what ``jax.vjp``
        says of it alone.
      bytes_then: What it keeps with the few-bit one.
      kept_for: The operations that keep the value after it, or a linear function of that, whatever
        the nonlinearity keeps: ``product`` with something trained, ``multiplication`` by it, or the
        name of another function.
      remat: Whether it is inside ``jax.checkpoint``, whose policy then decides what is kept.
    """

    function: str
    shape: tuple[int, ...]
    dtype: str
    scope: str
    source: str
    count: int
    bytes_now: int
    bytes_then: int
    kept_for: tuple[str, ...]
    remat: bool


class CallsReport:
    """Printed, a table of `CallsRow` and what to make of it.

    Attributes:
      rows: One a place that calls a nonlinearity, in the program's order.
      bytes_now: Of all rows.
      bytes_then: Of all rows.
    """

    def __init__(self, rows: Sequence[CallsRow]) -> None:
        self.rows = tuple(rows)
        self.bytes_now = sum(row.bytes_now for row in rows)
        self.bytes_then = sum(row.bytes_then for row in rows)

    @property
    def advice(self) -> str:
        """When few bits pay here, and when not."""
        sentences = []
        kept = sum(row.count for row in self.rows if row.kept_for)
        calls = sum(row.count for row in self.rows)
        if kept:
            sentences.append(
                f"After {kept} of {calls} calls the value is kept anyway, for an operation behind "
                "it: few bits save there no more than recomputing the nonlinearity does."
            )
        if kept < calls:
            sentences.append(
                f"After {calls - kept} of {calls} calls nothing keeps the value: few bits pay."
            )
        if any(row.remat for row in self.rows):
            sentences.append(
                "Inside jax.checkpoint the policy decides what is kept: "
                "save_only_these_names('few_bit_codes') keeps the codes."
            )
        sentences.append(
            "Measure the compiled peak: lro.activations.kept_for_backward(loss, model, ...)."
        )
        return "\n".join(sentences)

    def __rich__(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for name in _COLUMNS:
            number = name in ("times", "kept now", "kept then")
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            operand = f"{row.dtype} {' × '.join(map(str, row.shape))}"
            where = " ".join(filter(None, (row.scope, row.source)))
            sizes = f"{row.bytes_now:,}", f"{row.bytes_then:,}"
            kept_for = ", ".join(row.kept_for) or "–"
            cells = (row.function, operand, f"{row.count:,}", where, *sizes, kept_for)
            table.add_row(*map(Text, cells))
        sizes = f"{self.bytes_now:,}", f"{self.bytes_then:,}"
        table.add_row("total", "", "", "", *sizes, "", style="bold")
        return table

    def __str__(self) -> str:
        return f"{printed(self)}\n{self.advice}"

    __repr__ = __str__


def calls_report(sites: Sequence[Site], users: Users, packing: PackingName) -> CallsReport:
    """The report on what was found in a program."""
    rows: dict[Any, CallsRow] = {}
    for site in sites:
        few = lambda x, s=site: apply_few_bit(s.region, s.codebook, packing, x)
        row = CallsRow(
            str(site.known),
            tuple(site.x.aval.shape),
            str(site.x.aval.dtype),
            site.scope,
            site.source,
            site.count,
            site.count * _kept_bytes(site.region, site.x.aval),
            site.count * _kept_bytes(few, site.x.aval),
            users.keepers(site.y),
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


def _kept_bytes(fn: Callable[[jax.Array], jax.Array], aval: Any) -> int:
    """Bytes that the backward pass of a function of one array keeps of it."""
    x = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(fn, x)[1], x))
    bits = (math.prod(part.shape) * jax.dtypes.itemsize_bits(part.dtype) for part in kept)
    return sum(-(-count // 8) for count in bits)
