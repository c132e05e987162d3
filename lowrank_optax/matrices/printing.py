"""Tables as text."""

from collections.abc import Sequence
import io
from typing import Any


def printed(table: Any) -> str:
    """What ``rich`` makes of a table, as wide as it needs to be wherever it is printed."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def matrices_string(batch: Sequence[int], rows: int, columns: int) -> str:
    """``4 × (512 × 1376)``: a batch of matrices; ``512 × 1376`` is one."""
    matrix = f"{rows} × {columns}"
    return " × ".join([*map(str, batch), f"({matrix})"]) if batch else matrix
