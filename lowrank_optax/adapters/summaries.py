"""What is attached where in a model, as a table."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from flax import nnx

from lowrank_optax.adapters.adapted_layers import (
    AdapterConstant,
    AdapterParam,
    AlsoTrained,
    LayerAdapter,
    adapted_layers,
    weight_shape,
)
from lowrank_optax.adapters.base import Adapter, byte_count, counts_of, parameter_count
from lowrank_optax.adapters.low_rank import LowRank
from lowrank_optax.adapters.own_values import OwnedParameter, owned_parameters
from lowrank_optax.matrices.printing import printed
from lowrank_optax.matrices.selection import path_string

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("path", "weight", "adapter", "method", "rank", "trained", "frozen", "bytes", "state")
_NUMBERS = _COLUMNS[4:8]


class SummaryRow(NamedTuple):
    """One adapter in one layer (or stack of layers); or arrays that layers share; or others.

    Attributes:
      path: The layer's path, as ``blocks/attention/query``.
      weight: ``4 × (512 × 1376)``, the weights as a batch of matrices, inputs × outputs.
      adapter: The adapter's name.
      method: The name of its class; ``shared`` for arrays of a group, ``also trained`` for
        parameters of the model itself.
      rank: Its rank or ranks; None where it has none.
      trained: How many numbers of it are trained.
      frozen: How many are not.
      bytes: Bytes of both.
      state: ``active`` (with its strength, if that is not 1), ``inactive`` or ``merged``.
    """

    path: str
    weight: str
    adapter: str
    method: str
    rank: int | tuple[int, ...] | None
    trained: int
    frozen: int
    bytes: int
    state: str


class AdapterSummary:
    """Printed, a table of `SummaryRow`; see `summary`.

    Attributes:
      rows: One an adapter and layer, then shared arrays, then parameters that are also trained.
      trained: How many numbers are trained.
      model: How many parameters the model has, without adapters.
      bytes: Of all rows.
    """

    def __init__(self, rows: list[SummaryRow], model: int) -> None:
        self.rows, self.model = rows, model
        self.trained = sum(row.trained for row in rows)
        self.bytes = sum(row.bytes for row in rows)

    def __rich__(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for name in _COLUMNS:
            justify = "right" if name in _NUMBERS else "left"
            table.add_column(name, justify=justify, overflow="fold")
        for row in self.rows:
            rank = "–" if row.rank is None else str(row.rank)
            counts = (f"{n:,}" for n in (row.trained, row.frozen, row.bytes))
            cells = (row.path, row.weight, row.adapter, row.method, rank, *counts, row.state)
            table.add_row(*map(Text, cells))
        percent = f"{100 * self.trained / max(self.model, 1):.3g} % of {self.model:,} trained"
        frozen = sum(row.frozen for row in self.rows)
        counts = (f"{n:,}" for n in (self.trained, frozen, self.bytes))
        table.add_row("total", "", "", "", "", *counts, percent, style="bold")
        return table

    def __str__(self) -> str:
        return printed(self)

    __repr__ = __str__


def summary(model: Any) -> AdapterSummary:
    """What is attached where in a model: methods, ranks, counts and bytes.

    Args:
      model: Any NNX model, concrete or abstract.

    Returns:
      A table: print it, or read its ``rows``.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
      >>> _ = lro.adapters.attach(model, lro.adapters.LoRA(rank=2), rngs=0)
      >>> print(lro.adapters.summary(model))
      path      weight  adapter  method  rank  trained  frozen  bytes  state
      layers/0  8 × 4   default  LoRA       2       24       0     96  active
      total                                         24       0     96  66.7 % of 36 trained
    """
    rows = []
    for path, layer in adapted_layers(model).items():
        rows += [_row(path_string(path), layer, a) for a in layer.adapters.values()]
    for name, groups in getattr(model, "adapter_groups", {}).items():
        for group, arrays in groups.items():
            label = f"adapter_groups/{name}/{group}"
            rows.append(SummaryRow(label, "–", name, "shared", None, *_counts(arrays), ""))
    rows += [_row_of_values(one) for one in owned_parameters(model)]
    own = nnx.state(model, nnx.All(nnx.Param, nnx.Not(AdapterParam)))
    return AdapterSummary(rows, parameter_count(own))


def _row(path: str, layer: Any, adapter: LayerAdapter) -> SummaryRow:
    state = "merged" if adapter.merged else adapter.strength if adapter.active else None
    shape, counts = weight_shape(layer), _counts(adapter.variables())
    return row_of(path, shape, adapter.name, adapter.method, counts, state)


def _row_of_values(one: OwnedParameter) -> SummaryRow:
    shape = " × ".join(map(str, one.variable.shape)) or "scalar"
    values, size = one.values, math.prod(one.variable.shape)
    trained = isinstance(one.variable, AlsoTrained)
    copies = list(values.stored().values())
    stored = sum(map(byte_count, [one.variable] * trained + copies))
    return SummaryRow(
        path_string(one.path),
        shape,
        ", ".join(sorted(values.owners())),
        "also trained",
        None,
        size * trained,
        size * len(copies),
        stored,
        "inactive" if values.live is None else "active",
    )


def row_of(
    path: str,
    matrix: tuple[int, ...],
    name: str,
    method: Adapter,
    counts: tuple[int, int, int],
    state: str | float | None,
) -> SummaryRow:
    """The row of one adapter in one layer.

    Args:
      path: Of the layer.
      matrix: ``(*batch, d_in, d_out)``.
      name: Of the adapter.
      method: Of the layer.
      counts: Numbers trained, not trained, and bytes.
      state: A word, its strength, or None where it is inactive.
    """
    *batch, d_in, d_out = matrix
    view = f"{d_in} × {d_out}"
    view = f"{' × '.join(map(str, batch))} × ({view})" if batch else view
    rank = method.rank if isinstance(method, LowRank) else None
    if not isinstance(state, str):
        state = "inactive" if state is None else "active" if state == 1 else f"active × {state:g}"
    return SummaryRow(path, view, name, type(method).__name__, rank, *counts, state)


def _counts(arrays: Any) -> tuple[int, int, int]:
    trained, frozen = (nnx.state(arrays, of) for of in (AdapterParam, AdapterConstant))
    return counts_of(trained, frozen)
