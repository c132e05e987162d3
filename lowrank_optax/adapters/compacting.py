"""Cutting ranks that are exactly zero out of the adapters of a Flax NNX model."""

import math
import re
from typing import NamedTuple

from flax import nnx
import jax

from lowrank_optax.adapters.adapted_layers import (
    adapted_layers,
    check_names,
    remove_adapter,
    weight_shape,
)
from lowrank_optax.adapters.base import byte_count
from lowrank_optax.adapters.compact_lora import compact_arrays, rank_of
from lowrank_optax.adapters.partitions import matrix_sharding, variables
from lowrank_optax.matrices.selection import path_string
from lowrank_optax.modules.report import Report, Table


class CompactedLayer(NamedTuple):
    """What `compact` did to one layer, or one stack of layers.

    Attributes:
      path: Its path, as ``blocks/attention/query``.
      ranks: Ranks that are left, one for each layer of the stack; 0 where nothing is left.
      bytes_before: Bytes of the adapter's arrays before.
      bytes: Bytes of those that are left.
    """

    path: str
    ranks: tuple[int, ...]
    bytes_before: int
    bytes: int


class CompactReport(Report):
    """A table of `CompactedLayer`.

    Attributes:
      rows: One a layer, or stack of layers.
    """

    def __init__(self, rows: list[CompactedLayer]) -> None:
        self.rows = rows

    @property
    def rank_pattern(self) -> dict[str, int | tuple[int, ...]]:
        """The ranks that are left, by patterns of paths.

        With ``where=list(rank_pattern)`` it makes `attach` attach a `LoRA` of the same shapes to
        another model, into which a checkpoint of this one can be restored.
        """
        left = [row for row in self.rows if any(row.ranks)]
        return {f"^{re.escape(row.path)}$": rank_of(row.ranks) for row in left}

    def table(self) -> Table:
        """One row a layer, then totals."""
        cells = [(row.path, ", ".join(map(str, row.ranks)), *row[2:]) for row in self.rows]
        totals = sum(row.bytes_before for row in self.rows), sum(row.bytes for row in self.rows)
        columns = ("path", ">ranks", ">bytes before", ">bytes")
        return Table(columns, cells, [("total", "", *totals)])


def compact(model: nnx.Module, name: str = "default") -> CompactReport:
    """Cuts the ranks that are exactly zero out of an adapter, in place, and leaves a plain LoRA.

    A rank is dead if its column of the first factor or its row of the second is zero, with gates
    and scales multiplied in. These and the scale are folded into ``B``, so the layer has a `LoRA`
    of ``alpha=None``, and the same output to rounding. Layers of a stack are padded to the largest
    rank among them. A layer without a live rank loses its adapter; in a stack with others, it keeps
    zeros of rank 1.

    Call it after training and outside of ``jax.jit``: shapes change, so that functions of the model
    are compiled again, and an optimizer has to be made again.

    Args:
      model: The model that `attach` was given.
      name: Name of the adapter.

    Returns:
      A report that can be printed: the ranks of each layer, and bytes before and after.

    Raises:
      ValueError: If there is no adapter of that name, it is merged, or all of its ranks are dead.
      TypeError: If no LoRA of each layer has the same change: the method has no two factors (DoRA,
        SaRA, FlyLoRA with routing), changes the weight itself (PiSSA) or shares arrays among layers
        (LoTR, RandLoRA, VeRA). Also if arrays are traced.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> model, x = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0))), jnp.ones(8)
      >>> method = lro.adapters.SoRA(rank=4, initial="random")
      >>> _ = lro.adapters.attach(model, method, rngs=1)
      >>> gate = model.layers[0].adapters["default"].arrays["gate"]
      >>> gate[...] = jnp.array([0.0, 1.5, 0.0, -1.0])
      >>> y = model(x)
      >>> print(lro.adapters.compact(model))
      path      ranks  bytes before  bytes
      layers/0      2           208     96
      total                     208     96
      >>> print(bool(jnp.allclose(model(x), y, atol=1e-6)))
      True

    Reference:
      Ding et al., Sparse Low-rank Adaptation of Pre-trained Language Models, 2023,
      https://arxiv.org/abs/2311.11696, section 3.
    """
    check_names(model, [name])
    found, rows = [], []
    for path, layer in adapted_layers(model).items():
        if name not in layer.adapters:
            continue
        adapter, batch = layer.adapters[name], weight_shape(layer)[:-2]
        if adapter.merged:
            raise ValueError(
                f"the adapter {name!r} of {path_string(path)} is merged: unmerge the model first."
            )
        p = {k: x[...] for k, x in adapter.arrays.items()}
        layers = math.prod(batch)
        flat = {k: x.reshape(layers, *x.shape[len(batch) :]) for k, x in p.items()}
        left = compact_arrays(adapter.method, flat)
        size = byte_count(left.params) if any(left.ranks) else 0
        rows.append(CompactedLayer(path_string(path), left.ranks, byte_count(p), size))
        found.append((layer, batch, left))
    if not any(any(row.ranks) for row in rows):
        raise ValueError(
            f"all ranks of the adapter {name!r} are zero, so it changes nothing: `detach` it."
        )
    for layer, batch, (ranks, method, params) in found:
        if not any(ranks):
            remove_adapter(layer, name)
            continue
        params = jax.tree.map(lambda x, b=batch: x.reshape(*b, *x.shape[1:]), params)
        arrays = variables(params, method.axes, matrix_sharding(layer), len(batch))
        adapter = layer.adapters[name]
        adapter.method, adapter.arrays = method, nnx.Dict(arrays)
    return CompactReport(rows)
