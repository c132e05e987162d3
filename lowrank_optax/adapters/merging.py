"""Folding adapters into the weights they change, and taking them out again."""

from typing import Any

from lowrank_optax.adapters.adapted_layers import (
    LayerAdapter,
    adapted_layers,
    check_names,
    check_weights,
    set_weight_matrix,
    sharing,
    weight_matrix,
    weight_shape,
)
from lowrank_optax.adapters.folding import (
    Folding,
    MergedLayer,
    MergeReport,
    check_can_unmerge,
)
from lowrank_optax.adapters.tied_tables import check_not_tied
from lowrank_optax.matrices.selection import Path, path_string


def merge(model: Any, name: str | None = None) -> MergeReport:
    r"""Folds active adapters into the weights, in place: :math:`W + \sum_i s_i \Delta_i`.

    Sums are formed in float32, one layer of a stack at a time, and rounded once to the weight's
    dtype. The adapters stay, inactive, until `unmerge` takes them out of the weights again or
    `detach` takes them away. Until then their arrays are at ``merged_arrays`` instead of
    ``arrays``: restore the state of a merged model into a merged model.

    Args:
      model: The model that `attach` was given.
      name: Name of the adapter; None for all that are active.

    Returns:
      A report that can be printed: for each layer the largest rounding error, and how large the
      change is beside the weight.

    Raises:
      ValueError: If there is no adapter of that name, it is merged already or inactive; if none is
        active; or if a change that depends on the weight (DoRA's) would have to be merged together
        with others, or at a strength other than 1, from which the weight could not be found again;
        or if the model's config says that an adapted embedding is tied to its head. Where a model
        ties them by `Embed.attend` instead, calling that raises while an adapter is merged.
      TypeError: If an adapter has no matrix to add to the weight, as one that routes by its input;
        or if a layer may multiply by another weight than its parameter, as Powerpropagation's do.
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
    wanted, folding = check_names(model, [name] if name else []), []
    for path, layer in adapted_layers(model).items():
        adapters = [a for a in layer.adapters.values() if a.name in wanted]
        if name:
            _check_can_merge(path_string(path), adapters)
        adapters = [a for a in adapters if a.active]
        if adapters:
            _check_can_unmerge(path_string(path), layer, adapters)
            merged = f"the adapter {adapters[0].name!r} would be merged into the table"
            check_not_tied(model, path_string(path), layer, merged)
            folding.append((path, layer, adapters))
    if not folding:
        raise ValueError("no adapter of the model is active: there is nothing to merge.")
    check_weights(model, {path: layer for path, layer, _ in folding}, "merging changes")
    rows = []
    with sharing(model):
        for path, layer, adapters in folding:
            rows.append(_merge(path, layer, adapters))
    return MergeReport(rows)


def _merge(path: Path, layer: Any, adapters: list[LayerAdapter]) -> MergedLayer:
    # A function of its own: one layer's weights are not held while the next are folded.
    folding = _folding(path, layer, adapters)
    weights, row = folding.folded()
    set_weight_matrix(layer, weights)
    for adapter, checksum in zip(adapters, folding.checksums().values(), strict=True):
        adapter.set_merged(checksum)
    return row


def unmerge(model: Any, name: str | None = None) -> None:
    """Takes merged adapters out of the weights, in place, and makes them active again.

    The weights are those before `merge` to the rounding of their dtype.

    Args:
      model: The model that `merge` was given.
      name: Name of the adapter; None for all that are merged.

    Raises:
      ValueError: If there is no adapter of that name, none is merged, arrays or the strength of
        one have changed since `merge`, or its change has no inverse (the last two are not checked
        under a transformation).
      TypeError: If a layer may multiply by another weight than its parameter.
    """
    wanted, layers = check_names(model, [name] if name else []), []
    for path, layer in adapted_layers(model).items():
        adapters = [a for a in layer.adapters.values() if a.name in wanted and a.merged]
        if adapters:
            layers.append((path, layer, adapters))
    if not layers:
        raise ValueError(f"nothing to unmerge: none of {wanted} is merged.")
    check_weights(model, {path: layer for path, layer, _ in layers}, "unmerging changes")
    with sharing(model):
        for path, layer, adapters in layers:  # nothing is changed if one is refused
            before = {a.name: a.merge_checksum[...] for a in adapters}
            _folding(path, layer, adapters).check_unchanged(before)
        for path, layer, adapters in layers:
            set_weight_matrix(layer, _folding(path, layer, adapters).unfolded())
            for adapter in adapters:
                adapter.set_unmerged()


def _folding(path: Path, layer: Any, adapters: list[LayerAdapter]) -> Folding:
    *batch, d_in, d_out = weight_shape(layer)
    weights = weight_matrix(layer).reshape(-1, d_in, d_out)
    own = tuple({k: v[...] for k, v in a.variables().items()} for a in adapters)
    shared = tuple({k: v for k, v in a.p().items() if k not in a.variables()} for a in adapters)
    names = tuple(a.name for a in adapters)
    methods = tuple((a.method, a.strength) for a in adapters)
    return Folding(path_string(path), names, methods, weights, tuple(batch), own, shared)


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
        a for a in others if a.merged or (a.active and a.method.depends_on_weight)
    ]
    check_can_unmerge(path, [(a.name, a.method, a.strength) for a in together])
