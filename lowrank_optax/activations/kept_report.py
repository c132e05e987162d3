"""What backward keeps, as tables: of one loss, and of several beside each other."""

from collections.abc import Mapping
import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from lowrank_optax.matrices.printing import printed

if TYPE_CHECKING:
    from rich.table import Table


class KeptRow(NamedTuple):
    """Arrays between forward and backward that are alike, or one of them.

    Attributes:
      name: That of ``checkpoint_name``, such as ``few_bit_codes``; else what computes the array, as
        ``silu/logistic in MLP.__call__``: the primitive, within jitted functions, and the function
        of the program that calls these. Of an input its path.
      source: Linen's modules and the line of the program.
      shape: Of one.
      dtype: Of one.
      count: How many there are.
      bytes: Of all; ``uint4`` is half a byte.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True, repr=False)
class KeptReport:
    """What the backward pass of a loss keeps; printed, a table. See `kept_for_backward`.

    Attributes:
      arrays: One row an array, in the order in which ``jax.vjp`` keeps them.
      inputs: The same of inputs that the backward pass reads, which are there anyway: weights, data
        and arrays that the loss is closed over.
      temporary_bytes: What the compiled loss and gradient need beside arguments and results at
        their peak; None where that was not asked for, or the compiler does not say.
    """

    arrays: tuple[KeptRow, ...]
    inputs: tuple[KeptRow, ...]
    temporary_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """Of ``arrays``."""
        return sum(row.bytes for row in self.arrays)

    @property
    def rows(self) -> list[KeptRow]:
        """The arrays, with those in one row that differ in nothing; most bytes first."""
        return _grouped(self.arrays)

    def bytes_by_name(self) -> dict[str, int]:
        """Bytes of all arrays of a name; most first."""
        total: dict[str, int] = {}
        for row in self.arrays:
            total[row.name] = total.get(row.name, 0) + row.bytes
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def __rich__(self) -> "Table":
        table = _table(("kept", "source", "shape", "dtype"), ("count", "bytes"))
        for row in self.rows:
            shape = " × ".join(map(str, row.shape)) or "scalar"
            count = str(row.count)
            _add(table, row.name, row.source, shape, row.dtype, count, f"{row.bytes:,}")
        read = sum(row.bytes for row in self.inputs)
        _add(table, "(inputs, not counted)", "", "", "", str(len(self.inputs)), f"{read:,}")
        blank = ("", "", "")
        table.add_row("total", *blank, str(len(self.arrays)), f"{self.total_bytes:,}", style="bold")
        if self.temporary_bytes is not None:
            table.add_row("compiled temporaries", *blank, "", f"{self.temporary_bytes:,}")
        return table

    def __str__(self) -> str:
        return printed(self)

    __repr__ = __str__


class KeptComparison:
    """Reports beside each other; printed, bytes by name. See `compare_kept`.

    Attributes:
      reports: `KeptReport` by the names that were given.
    """

    def __init__(self, reports: Mapping[str, KeptReport]) -> None:
        self.reports = dict(reports)

    def __rich__(self) -> "Table":
        table = _table(("kept",), tuple(self.reports))
        named = [report.bytes_by_name() for report in self.reports.values()]
        names = dict.fromkeys(name for one in named for name in one)
        most = lambda name: max(one.get(name, 0) for one in named)
        for name in sorted(names, key=most, reverse=True):
            _add(table, name, *(f"{one[name]:,}" if name in one else "–" for one in named))
        totals = [f"{report.total_bytes:,}" for report in self.reports.values()]
        table.add_row("total", *totals, style="bold")
        peaks = [report.temporary_bytes for report in self.reports.values()]
        if any(peak is not None for peak in peaks):
            cells = ("–" if peak is None else f"{peak:,}" for peak in peaks)
            table.add_row("compiled temporaries", *cells)
        return table

    def __str__(self) -> str:
        return printed(self)

    __repr__ = __str__


def _grouped(rows: tuple[KeptRow, ...]) -> list[KeptRow]:
    alike: dict[tuple[object, ...], list[KeptRow]] = {}
    for row in rows:
        alike.setdefault((row.name, row.source, row.shape, row.dtype), []).append(row)
    groups = [
        same[0]._replace(count=len(same), bytes=sum(row.bytes for row in same))
        for same in alike.values()
    ]
    return sorted(groups, key=lambda row: -row.bytes)


def _table(words: tuple[str, ...], numbers: tuple[str, ...]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _add(table: "Table", *cells: str) -> None:
    """A row of text as it stands: brackets in it are no markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))
