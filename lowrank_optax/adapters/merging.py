"""Folding adapters into the weights they change, and taking them out again."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.adapted_layers import (
    LayerAdapter,
    adapted_layers,
    check_names,
    set_weight_matrix,
    sharing,
    weight_matrix,
    weight_shape,
)
from lowrank_optax.adapters.base import Arrays
from lowrank_optax.adapters.folding import (
    MergedLayer,
    MergeReport,
    Methods,
    check_can_unmerge,
    check_unchanged,
    checksum,
    depends_on_weight,
    folded,
    unfolded,
)
from lowrank_optax.adapters.tied_tables import check_not_tied
from lowrank_optax.matrices.selection import path_string


def merge(model: Any, name: str | None = None) -> MergeReport:
    r"""Folds active adapters into the weights, in place: :math:`W + \sum_i s_i \Delta_i`.

    Sums are formed in float32, one layer of a stack at a time, and rounded once to the weight's
    dtype. The adapters stay, inactive, until `unmerge` takes them out of the weights again or
    `detach` takes them away. Until then their arrays are at ``merged_arrays`` instead of
    ``arrays``: restore the state of a merged model into a merged model.

    Args:
      model: The model that `attach` was given.
      name: Of the adapter; None for all that are active.

    Returns:
      A report that can be printed: for each layer the largest rounding error, and how large the
      change is beside the weight.

    Raises:
      ValueError: If there is no adapter of that name, it is merged already or inactive; if none is
        active; or if a change that depends on the weight (DoRA's) would have to be merged together
        with others, or at a strength other than 1, from which the weight could not be found again;
        or if the model's config says that an adapted embedding is tied to its head. Where a model
        ties them by `Embed.attend` instead, calling that raises while an adapter is merged.
      RuntimeError: If the adapter shares arrays with layers outside of ``model``.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> model, x = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), jnp.ones(4)
      >>> method = lro.adapters.LoRA(rank=2, initial="random")
      >>> y = lro.adapters.attach(model, method, where=".*", rngs=0)(x)
      >>> report = lro.adapters.merge(model)
      >>> print(report.rows[0].rounding_error, bool(jnp.allclose(model(x), y, atol=1e-6)))
      0.0 True
    """
    wanted = check_names(model, [name] if name else [])
    folding = []
    for path, layer in adapted_layers(model).items():
        adapters = [a for a in layer.adapters.values() if a.name in wanted]
        if name:
            _check_can_merge(path_string(path), adapters)
        adapters = [a for a in adapters if a.active]
        if adapters:
            _check_can_unmerge(path_string(path), layer, adapters)
            merged = f"the adapter {adapters[0].name!r} would be merged into the table"
            check_not_tied(model, path_string(path), layer, merged)
            folding.append((path_string(path), layer, adapters))
    if not folding:
        raise ValueError("no adapter of the model is active: there is nothing to merge.")
    rows = []
    with sharing(model):
        for path, layer, adapters in folding:
            rows.append(MergedLayer(path, *_fold(layer, adapters)))
            for adapter, number in _checksums(layer, adapters):
                adapter.set_merged(number)
    return MergeReport(rows)


def unmerge(model: Any, name: str | None = None) -> None:
    """Takes merged adapters out of the weights, in place, and makes them active again.

    The weights are those before `merge` to the rounding of their dtype.

    Args:
      model: The model that `merge` was given.
      name: Of the adapter; None for all that are merged.

    Raises:
      ValueError: If there is no adapter of that name, none is merged, or arrays or the strength of
        one have changed since `merge` (not checked under a transformation).
    """
    wanted = check_names(model, [name] if name else [])
    folding = []
    for path, layer in adapted_layers(model).items():
        adapters = [a for a in layer.adapters.values() if a.name in wanted and a.merged]
        if adapters:
            folding.append((path_string(path), layer, adapters))
    if not folding:
        raise ValueError(f"nothing to unmerge: none of {wanted} is merged.")
    with sharing(model):
        for path, layer, adapters in folding:  # nothing is changed if one is refused
            for adapter, number in _checksums(layer, adapters):
                check_unchanged(path, adapter.name, adapter.merge_checksum[...], number)
        for _, layer, adapters in folding:
            _unfold(layer, adapters)
            for adapter in adapters:
                adapter.set_unmerged()


def _fold(layer: Any, adapters: list[LayerAdapter]) -> tuple[jax.Array, jax.Array]:
    stack, parts = _stacked(weight_matrix(layer), adapters)
    merged, error, size = folded(_methods(adapters), stack, *parts)
    set_weight_matrix(layer, merged)
    return error, size


def _unfold(layer: Any, adapters: list[LayerAdapter]) -> None:
    stack, parts = _stacked(weight_matrix(layer), adapters)
    set_weight_matrix(layer, unfolded(_methods(adapters), stack, *parts))


def _checksums(layer: Any, adapters: list[LayerAdapter]) -> list[tuple[LayerAdapter, jax.Array]]:
    """Of each adapter, with the layer's stack axes, along which a scan cuts it."""
    batch = weight_shape(layer)[:-2]
    number = lambda a: checksum(a.strength, *_arrays(a, len(batch)))
    whole = lambda x: jnp.broadcast_to(x, (math.prod(batch),)).reshape(batch)
    return [(adapter, whole(number(adapter))) for adapter in adapters]


def _methods(adapters: list[LayerAdapter]) -> Methods:
    return tuple((adapter.method, adapter.strength) for adapter in adapters)


def _stacked(
    matrices: jax.Array, adapters: list[LayerAdapter]
) -> tuple[jax.Array, tuple[tuple[Arrays, ...], tuple[Arrays, ...]]]:
    """Weights ``[L, d_in, d_out]``, each adapter's own arrays ``[L, ...]``, and its shared ones."""
    batch = matrices.ndim - 2
    both = [_arrays(a, batch) for a in adapters]
    own, shared = tuple(own for own, _ in both), tuple(shared for _, shared in both)
    return matrices.reshape(-1, *matrices.shape[batch:]), (own, shared)


def _arrays(adapter: LayerAdapter, batch: int) -> tuple[Arrays, Arrays]:
    """An adapter's own arrays ``[L, ...]`` and those it shares."""
    own = {k: v[...].reshape(-1, *v.shape[batch:]) for k, v in adapter.variables().items()}
    return own, {k: v for k, v in adapter.p().items() if k not in own}


def _check_can_merge(path: str, adapters: list[LayerAdapter]) -> None:
    for adapter in adapters:
        if adapter.merged:
            raise ValueError(f"the adapter {adapter.name!r} of {path} is merged already.")
        if not adapter.active:
            raise ValueError(
                f"the adapter {adapter.name!r} of {path} is inactive: activate it first."
            )


def _check_can_unmerge(path: str, layer: Any, adapters: list[LayerAdapter]) -> None:
    others = [a for a in layer.adapters.values() if a.name not in {x.name for x in adapters}]
    # An active one that depends on the weight would be applied to the merged weight.
    together = adapters + [
        a for a in others if a.merged or (a.active and depends_on_weight(a.method))
    ]
    check_can_unmerge(path, [(a.name, a.method, a.strength) for a in together])
