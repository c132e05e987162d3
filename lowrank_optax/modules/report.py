"""One table behind every summary and report: columns, rows, footer."""

from collections.abc import Iterable, Sequence
import io
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table as RichTable


class Table(NamedTuple):
    """What is printed.

    Cells are shown as text: strings as they are, integers with thousands separators, shapes
    (tuples) as ``4 × 16``, and None as a dash.

    Attributes:
      columns: Titles; a leading ``>`` aligns the column to the right.
      rows: One sequence of cells a row.
      footer: Rows below, in bold: totals.
      notes: Text below the table.
    """

    columns: Sequence[str]
    rows: Iterable[Sequence[Any]]
    footer: Iterable[Sequence[Any]] = ()
    notes: str = ""


class Report:
    """Base class of objects that print as a table; a subclass defines `table`."""

    def table(self) -> Table:
        """Columns, rows and footer."""
        raise NotImplementedError

    def __rich__(self) -> "RichTable":
        from rich.table import Table as RichTable
        from rich.text import Text

        columns, rows, footer, _ = self.table()
        made = RichTable(box=None, pad_edge=False)
        for title in columns:
            justify = "right" if title.startswith(">") else "left"
            made.add_column(title.removeprefix(">"), justify=justify, overflow="fold")
        for style, group in (("", rows), ("bold", footer)):
            for row in group:
                # Text, not str: brackets in a cell are no markup.
                made.add_row(*(Text(_cell(x)) for x in row), style=style)
        return made

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        # As wide as the table needs, wherever it is printed.
        Console(file=text, width=10_000, color_system=None).print(self.__rich__())
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        return "\n".join([*lines, *self.table().notes.splitlines()])

    __repr__ = __str__


def matrices_string(shape: Sequence[int]) -> str:
    """``4 × (512 × 1376)`` for a batch of matrices ``[4, 512, 1376]``; ``512 × 1376`` for one."""
    *batch, rows, columns = shape
    matrix = f"{rows} × {columns}"
    return " × ".join([*map(str, batch), f"({matrix})"]) if batch else matrix


def _cell(x: Any) -> str:
    if x is None:
        return "–"
    if isinstance(x, tuple):
        return " × ".join(map(str, x)) or "scalar"
    return f"{x:,}" if isinstance(x, int) else str(x)
