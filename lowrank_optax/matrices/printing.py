"""Tables as text."""

import io
from typing import Any


def printed(table: Any) -> str:
    """What ``rich`` makes of a table, as wide as it needs to be wherever it is printed."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
