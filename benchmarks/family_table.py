"""Tables for a terminal or for a page."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from timing import print_table


class Column(NamedTuple):
    """A heading, and what stands below it for a row."""

    heading: str
    cell: Callable[[Any], str]


def print_columns(title: str, rows: Sequence[Any], columns: list[Column], markdown: bool) -> None:
    """Prints a table, by rich or as Markdown; the first column is flush left."""
    headings = [column.heading for column in columns]
    cells = [[column.cell(row) for column in columns] for row in rows]
    if not markdown:
        print_table(title, headings, cells)
        return
    for line in (headings, ["---"] + ["---:"] * (len(columns) - 1), *cells):
        print(f"| {' | '.join(line)} |")
