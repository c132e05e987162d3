"""Which layers of a model are randomized, as a table."""

from typing import TYPE_CHECKING, NamedTuple

from lowrank_optax.layers.randomized.sketch import Sketch
from lowrank_optax.matrices.printing import printed

if TYPE_CHECKING:
    from rich.table import Table


class RandomizedLayer(NamedTuple):
    """One randomized layer, or stack of layers.

    Attributes:
      path: Its path, as ``blocks/mlp/up``.
      weight: ``4 × (512 × 1376)``, its weights as a batch of matrices, inputs × outputs.
      sketch: What is kept of its input.
    """

    path: str
    weight: str
    sketch: Sketch


class RandomizedSummary:
    """Printed, a table of `RandomizedLayer`.

    Attributes:
      rows: One a layer, or stack of layers.
    """

    def __init__(self, rows: list[RandomizedLayer]) -> None:
        self.rows = rows

    def __rich__(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for name in ("path", "weight", "sketch", "kept"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            cells = (row.path, row.weight, row.sketch.kind, kept_string(row.sketch))
            table.add_row(*map(Text, cells))
        return table

    def __str__(self) -> str:
        return printed(self)

    __repr__ = __str__


def kept_string(sketch: Sketch) -> str:
    """``12.5% of rows, 16 at least``."""
    if sketch.fraction is None:
        size = f"{sketch.size} rows"
    else:
        size = f"{100 * sketch.fraction:.3g}% of rows"
    least = f", {sketch.min_size} at least" if sketch.min_size > 1 else ""
    most = "" if sketch.max_size is None else f", {sketch.max_size} at most"
    return size + least + most
