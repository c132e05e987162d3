"""What is attached where in a model, as a table."""

from collections.abc import Iterable, Mapping
import math
from typing import Any, NamedTuple

from flax import nnx

from lowrank_optax.adapters.adapted_layers import (
    AdapterConstant,
    AdapterParam,
    AlsoTrained,
    adapted_layers,
    weight_shape,
)
from lowrank_optax.adapters.base import Adapter, byte_count, counts_of, parameter_count
from lowrank_optax.adapters.own_values import owned_parameters
from lowrank_optax.matrices.selection import path_string
from lowrank_optax.modules.report import Report, Table, matrices_string


class SummaryRow(NamedTuple):
    """One adapter in one layer (or stack of layers), arrays that layers share, or a parameter.

    Attributes:
      path: The layer's path, as ``blocks/attention/query``.
      weight: ``4 × (512 × 1376)``, the weights as a batch of matrices, inputs × outputs.
      adapter: The adapter's name.
      method: The name of its class; ``shared`` for arrays of a group, ``also trained`` for
        parameters of the model itself.
      rank: Its rank or ranks; None where it has none.
      trained: How many of its numbers are trained by their gradients.
      frozen: How many are not: constants, frozen arrays and statistics (`Adapter.statistics`).
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


class AdapterSummary(Report):
    """Printed, a table of `SummaryRow`; see `summary`.

    Attributes:
      rows: One `SummaryRow` per adapter and layer, then shared arrays, then parameters that are
        also trained.
      trained: How many numbers are trained.
      model: How many parameters the model has, without adapters.
      bytes: Bytes of all rows.
    """

    def __init__(self, rows: list[SummaryRow], model: int) -> None:
        self.rows, self.model = rows, model
        self.trained = sum(row.trained for row in rows)
        self.bytes = sum(row.bytes for row in rows)

    def table(self) -> Table:
        """One row per `SummaryRow`, then totals."""
        columns = [f">{name}" if 4 <= n < 8 else name for n, name in enumerate(SummaryRow._fields)]
        shown = lambda rank: None if rank is None else str(rank)  # (1, 3, 2), and not 1 × 3 × 2
        rows = [(*row[:4], shown(row.rank), *row[5:]) for row in self.rows]
        counts = self.trained, sum(row.frozen for row in self.rows), self.bytes
        percent = f"{100 * self.trained / max(self.model, 1):.3g} % of {self.model:,} trained"
        return Table(columns, rows, [("total", "", "", "", "", *counts, percent)])


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
    counts = lambda arrays: counts_of(*nnx.state(arrays, AdapterParam, AdapterConstant))
    rows = []
    for path, layer in adapted_layers(model).items():
        where, shape = path_string(path), weight_shape(layer)
        for a in layer.adapters.values():
            state = "merged" if a.merged else a.strength if a.active else None
            arrays = nnx.state(a.variables(), AdapterParam, AdapterConstant)
            rows.append(row_of(where, shape, a.name, a.method, map(dict, arrays), state))
    for name, groups in getattr(model, "adapter_groups", {}).items():
        for group, arrays in groups.items():
            label = f"adapter_groups/{name}/{group}"
            rows.append(SummaryRow(label, "–", name, "shared", None, *counts(arrays), ""))
    for one in owned_parameters(model):
        trained, size = isinstance(one.variable, AlsoTrained), math.prod(one.variable.shape)
        stored = list(one.values.stored().values())
        row = SummaryRow(
            path_string(one.path),
            " × ".join(map(str, one.variable.shape)) or "scalar",
            ", ".join(sorted(one.values.owners())),
            "also trained",
            None,
            size * trained,
            size * len(stored),
            sum(map(byte_count, [one.variable] * trained + stored)),
            "inactive" if one.values.live is None else "active",
        )
        rows.append(row)
    own = nnx.state(model, nnx.All(nnx.Param, nnx.Not(AdapterParam)))
    return AdapterSummary(rows, parameter_count(own))


def row_of(
    path: str,
    matrix: tuple[int, ...],
    name: str,
    method: Adapter,
    arrays: Iterable[Mapping[str, Any]],
    state: str | float | None,
) -> SummaryRow:
    """The row of one adapter in one layer.

    Args:
      path: Path of the layer.
      matrix: ``(*batch, d_in, d_out)``.
      name: Name of the adapter.
      method: The adapter with the layer's rank.
      arrays: Its trained arrays and its others, or their shapes, by name. Statistics among the
        trained ones are not counted as trained.
      state: A word, its strength, or None where it is inactive.
    """
    trained, frozen = arrays
    slots = {key: x for key, x in trained.items() if key in method.statistics}
    others = {key: x for key, x in trained.items() if key not in slots}
    counts = counts_of(others, {**frozen, **slots})
    rank = getattr(method, "rank", None)
    if not isinstance(state, str):
        state = "inactive" if state is None else "active" if state == 1 else f"active × {state:g}"
    view = matrices_string(matrix)
    return SummaryRow(path, view, name, type(method).__name__, rank, *counts, state)
