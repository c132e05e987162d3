"""Which modules of a model were made few-bit, as a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lowrank_optax.activations.calls_report import CallsReport
from lowrank_optax.matrices.printing import printed

if TYPE_CHECKING:
    from rich.table import Table


class QuantizedRow(NamedTuple):
    """A module whose nonlinearities are few-bit.

    Attributes:
      path: Its path in the model; "" is the model itself.
      module: The name of its class.
      bits: Of a code.
      methods: Its methods that run with few-bit nonlinearities.
    """

    path: str
    module: str
    bits: int
    methods: tuple[str, ...]


class QuantizeReport:
    """Printed, which modules were chosen, and what is called in them.

    Attributes:
      rows: One a module.
      calls: The calls in a call of the model, if `quantize_model` was given ``inputs``; else None.
    """

    def __init__(self, rows: Sequence[QuantizedRow], calls: CallsReport | None) -> None:
        self.rows, self.calls = tuple(rows), calls

    def __rich__(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for name in ("path", "module", "bits", "methods"):
            table.add_column(name, justify="right" if name == "bits" else "left", overflow="fold")
        for row in self.rows:
            methods = ", ".join(row.methods)
            cells = (row.path or "(the model)", row.module, str(row.bits), methods)
            table.add_row(*map(Text, cells))
        return table

    def __str__(self) -> str:
        behind = (
            "Give inputs= for a table of the calls, and of whether few bits pay there."
            if self.calls is None
            else str(self.calls)
        )
        return f"{printed(self)}\n{behind}"

    __repr__ = __str__
