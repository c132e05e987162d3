"""Dense layers of a model made Maestro layers, and back; cuts of these to smaller ranks."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.maestro.maestro_layers import MaestroConv, MaestroLinear, checked_rank
from lowrank_optax.layers.maestro.ordered import is_static, keep_prefix
from lowrank_optax.layers.maestro.ordered_layer import MaestroLayer
from lowrank_optax.layers.maestro.ranks import maestro_modules
from lowrank_optax.layers.structured.factors import Factors, low_rank_factors
from lowrank_optax.layers.structured.feed_forward_layers import (
    layers_outside_factors,
)
from lowrank_optax.matrices.selection import Path, Where, path_string
from lowrank_optax.modules.plain_layers import check_own_kernels, check_plain_layer
from lowrank_optax.modules.report import Report, Table, matrices_string
from lowrank_optax.modules.select import select
from lowrank_optax.modules.wrap import become

TruncationMethod: TypeAlias = Literal["prefix", "svd"]
"""How `truncate` chooses the directions that are left."""


def convert(model: nnx.Module, where: Where = None, *, rank: int | None = None) -> "MaestroSummary":
    """Turn linear layers and convolutions of a model into Maestro layers, in place.

    Factors are the spectral split of the layer's kernel, so the model computes what it did, to
    rounding. Biases stay as they are. Stacked layers are converted one by one. Other kinds of
    layers, such as the ``nnx.LinearGeneral`` of ``nnx.MultiHeadAttention``, stay dense.

    Args:
      model: Any NNX model.
      where: Layers of type ``nnx.Linear`` or ``nnx.Conv`` to convert: a regular expression found in
        a path such as ``blocks/mlp/up``, a filter of ``flax.nnx`` or a function of path and module.
        None for all except output heads.
      rank: Number of directions of each layer, which truncates the split; None for the smaller side
        of each weight.

    Returns:
      The Maestro layers of the model; print it.

    Raises:
      ValueError: If ``where`` matches no layer (the message lists similar paths), ``rank`` is not
        from 1 to the smaller side of each weight, a convolution is grouped, a layer is more than a
        plain one (it has adapters, a mask, a call or a product of its own, or stack axes that are
        not in front), or its kernel is shared with another layer or not an ``nnx.Param``.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> from lowrank_optax.models import Decoder, decoder_config
      >>> model = Decoder(decoder_config("llama-tiny", vocab_size=256), rngs=nnx.Rngs(0))
      >>> print(lro.layers.maestro.convert(model, where="mlp"))
      path             weight               ranks  parameters  of dense
      blocks/mlp/down  4 × (344 × 128)  128 / 128     241,664    137.2%
      blocks/mlp/gate  4 × (128 × 344)  128 / 128     241,664    137.2%
      blocks/mlp/up    4 × (128 × 344)  128 / 128     241,664    137.2%

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929.
    """
    dense = layers_outside_factors(model, nnx.Linear | nnx.Conv)
    chosen = select(dense, where, "linear layer or convolution")
    check_own_kernels(chosen, dense)
    for path, layer in chosen.items():
        _check_layer(path_string(path), layer, rank)
    for layer in chosen.values():
        is_linear = isinstance(layer, nnx.Linear)
        make: Any = MaestroLinear.from_linear if is_linear else MaestroConv.from_conv
        become(layer, make(layer, rank))
    return summary(model)


def merge(model: nnx.Module, where: Where = None) -> nnx.Module:
    """Turn Maestro layers into ``nnx.Linear`` and ``nnx.Conv`` layers, in place.

    Kernels are the products of the factors at the current ranks.

    Args:
      model: A model with Maestro layers.
      where: Maestro layers, as for `convert`; None for all.

    Returns:
      The model itself.

    Raises:
      ValueError: If the model has no Maestro layer, ``where`` matches none, or the factors of a
        layer have adapters.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> layer = lro.layers.MaestroLinear(8, 16, rngs=nnx.Rngs(0))
      >>> type(lro.layers.maestro.merge(layer)).__name__, layer.kernel.shape
      ('Linear', (8, 16))
    """
    layers: dict[Path, MaestroLayer] = {
        tuple(path.split("/")): layer for path, layer in maestro_modules(model).items()
    }
    if where is not None:
        layers = select(layers, where, "Maestro layer")
    for path, layer in layers.items():
        check_unadapted(path_string(path), layer)
    for layer in layers.values():
        become(layer, layer.dense())
    return model


def truncate(model: nnx.Module, rank: int, method: TruncationMethod = "prefix") -> nnx.Module:
    """Lower the current rank of each Maestro layer to at most ``rank``, in place.

    Arrays keep their sizes, and what is cut is masked: `compact` makes them smaller. Sampled ranks
    are removed.

    Args:
      model: A model with Maestro layers.
      rank: Largest rank that is left.
      method: ``"prefix"`` keeps the first directions as they are. ``"svd"`` replaces the factors of
        a layer whose rank falls by the spectral split of their product, whose first directions are
        the nearest to it; the other directions become zero, for ever.

    Returns:
      The model itself.

    Raises:
      ValueError: If the model has no Maestro layer, ``rank`` is not an integer of at least 0, there
        is no such method, or, with ``"svd"``, the factors of a layer have adapters.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> model = nnx.Sequential(lro.layers.MaestroLinear(8, 16, rngs=nnx.Rngs(0)))
      >>> print(lro.layers.maestro.summary(lro.layers.maestro.truncate(model, 2)))
      path      weight  ranks  parameters  of dense
      layers/0  8 × 16  2 / 8         192    150.0%

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929.
    """
    if not is_static(rank) or rank < 0:
        raise ValueError(f"rank={rank!r} must be an integer of at least 0.")
    if method not in get_args(TruncationMethod):
        raise ValueError(f"method must be 'prefix' or 'svd', got {method!r}.")
    layers = maestro_modules(model)
    for path, layer in layers.items():
        if method == "svd":
            check_unadapted(path, layer)
    for layer in layers.values():
        left = jnp.minimum(layer.rank[...], rank)
        if method == "prefix":
            layer.set_rank(left)
        else:
            v, u = low_rank_factors(layer.matrix(), layer.width())
            cut = left[..., None, None]
            split = Factors(keep_prefix(v, cut), keep_prefix(u.mT, cut).mT)
            falls = cut < layer.rank[..., None, None]
            both = zip(split, layer.factors(), strict=True)
            chosen = (jnp.where(falls, new, old) for new, old in both)
            layer.set_factors(Factors(*chosen), left)
    return model


class MaestroRow(NamedTuple):
    """A Maestro layer, or a stack of layers.

    Attributes:
      path: Path of the layer, such as ``blocks/mlp/up``.
      weight: Weights as a batch of matrices, inputs × outputs: ``4 × (512 × 1376)``.
      ranks: Current ranks, one for each layer of the stack; None where they have no values, as in
        ``nnx.eval_shape`` or inside ``jit``.
      directions: Number of directions that the arrays have.
      parameters: Number of elements of the factors.
      share: The same, divided by the number of elements of the dense weights.
    """

    path: str
    weight: str
    ranks: tuple[int, ...] | None
    directions: int
    parameters: int
    share: float


@dataclasses.dataclass(frozen=True, repr=False)
class MaestroSummary(Report):
    """The Maestro layers of a model; prints as a table.

    Attributes:
      rows: One `MaestroRow` per layer, or stack of layers.
    """

    rows: list[MaestroRow]

    def table(self) -> Table:
        """One row per layer; of a stack the smallest and the largest rank."""
        columns = ("path", "weight", ">ranks", ">parameters", ">of dense")
        cells = []
        for row in self.rows:
            few, many = (min(row.ranks), max(row.ranks)) if row.ranks else ("?", "?")
            ranks = f"{few}" if few == many else f"{few}–{many}"
            own = (f"{ranks} / {row.directions}", row.parameters, f"{row.share:.1%}")
            cells.append((row.path, row.weight, *own))
        return Table(columns, cells)


def summary(model: nnx.Module) -> MaestroSummary:
    """Return the Maestro layers of a model with their ranks: print it, or read its ``rows``.

    Raises:
      ValueError: If the model has no Maestro layer.
    """
    rows = []
    for path, layer in maestro_modules(model).items():
        *inputs, outputs = layer.kernel_shape()
        shape = (*layer.stack(), math.prod(inputs), outputs)
        rank = layer.rank.get_raw_value()
        has_values = isinstance(rank, jax.Array) and not isinstance(rank, jax.core.Tracer)
        ranks = tuple(np.ravel(rank).tolist()) if has_values else None
        count = layer.ordered_in.kernel.size + layer.ordered_out.kernel.size
        sizes = (layer.width(), count, count / math.prod(shape))
        rows.append(MaestroRow(path, matrices_string(shape), ranks, *sizes))
    return MaestroSummary(rows)


def check_unadapted(path: str, layer: MaestroLayer) -> None:
    """Raises ValueError if the factors have adapters."""
    if not layer.is_plain():
        raise ValueError(
            f"the factors of {path} have adapters, or another call than plain layers: merge and "
            "detach adapters first (lro.adapters.merge, lro.adapters.detach)."
        )


def _check_layer(path: str, layer: Any, rank: int | None) -> None:
    """Raises ValueError if a layer is more than a plain one, or the rank does not fit."""
    check_plain_layer(path, layer)
    if getattr(layer, "feature_group_count", 1) != 1:
        raise ValueError(
            f"{path} has feature_group_count={layer.feature_group_count}, and must have 1: the "
            "kernel of a grouped convolution is not one matrix. Leave it out by where."
        )
    try:
        window = math.prod(getattr(layer, "kernel_size", ()))
        checked_rank(rank, window * layer.in_features, layer.out_features)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
