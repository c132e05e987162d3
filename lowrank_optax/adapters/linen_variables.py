"""The variables of an adapted Linen model: what lies where, and reading and setting weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import linen as nn
import jax

from lowrank_optax.adapters import groups
from lowrank_optax.adapters.base import Arrays
from lowrank_optax.adapters.linen_sites import LinenSite
from lowrank_optax.matrices.views import from_matrix, to_matrix

TRAINED, CONSTANTS, MERGED = "adapters", "adapter_constants", "merged_adapters"
"""Collections: arrays that are trained, arrays that are not, and both of adapters merged."""

CHECKSUMS = "checksums"
"""Beside the arrays of a merged adapter: what they were, by layer; see `folding.checksum`."""


def own_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the model itself."""
    return {k: v for k, v in variables.items() if k not in (TRAINED, CONSTANTS, MERGED)}


def arrays_of(variables: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """The trees of one adapter that is not merged: trained, constant; empty where there is none."""
    return tuple(variables.get(c, {}).get(name, {}) for c in (TRAINED, CONSTANTS))  # type: ignore[return-value]


def merged_arrays_of(variables: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Likewise of one that is merged."""
    both = variables.get(MERGED, {}).get(name, {})
    return both.get(TRAINED, {}), both.get(CONSTANTS, {})


def adapters_in(variables: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each adapter that there are arrays of is merged, by name.

    Raises:
      ValueError: If there are arrays of one that is merged beside those merged.
    """
    unmerged = {name: False for c in (TRAINED, CONSTANTS) for name in variables.get(c, {})}
    merged = {name: True for name in variables.get(MERGED, {})}
    if both := sorted(unmerged.keys() & merged.keys()):
        raise ValueError(
            f"the adapter {both[0]!r} is merged into these params, and there are arrays of it in "
            f"{TRAINED!r} or {CONSTANTS!r} as well: its change would count twice. Unmerge the "
            "variables, or leave those arrays out."
        )
    return unmerged | merged


def with_arrays(
    variables: Mapping[str, Any],
    name: str,
    trained: Any,
    constant: Any,
    *,
    checksums: Mapping[str, jax.Array] | None = None,
) -> dict[str, Any]:
    """The variables with the arrays of one adapter; with checksums, of one that is merged."""
    new = without_arrays(variables, [name])
    if checksums is not None:
        both = ((TRAINED, trained), (CONSTANTS, constant), (CHECKSUMS, dict(checksums)))
        kept = {c: t for c, t in both if t}
        return new | {MERGED: {**new.get(MERGED, {}), name: kept}}
    for collection, tree in ((TRAINED, trained), (CONSTANTS, constant)):
        if tree:
            new[collection] = {**new.get(collection, {}), name: tree}
    return new


def without_arrays(variables: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The variables without those of these adapters, nor a collection that they leave empty."""
    new, gone = dict(variables), set(names)
    for collection in (TRAINED, CONSTANTS, MERGED):
        if collection in new:
            kept = {k: v for k, v in new[collection].items() if k not in gone}
            new.pop(collection)
            if kept:
                new[collection] = kept
    return new


def stack_shape(variables: Mapping[str, Any], path: tuple[str, ...], site: LinenSite) -> tuple:
    """The leading axes of a weight that its layer does not have: of a scan or vmap over layers.

    Raises:
      ValueError: If there is no such weight, or its stack axes do not lead.
    """
    value, own = _leaf(variables, path, site), site.kernel.shape
    split = value.ndim - len(own)
    if split < 0 or value.shape[split:] != own:
        raise ValueError(
            f"the weight of {'/'.join(path)} has shape {value.shape} in params, {own} in its layer:"
            " layers must be stacked along the first axis."
        )
    return value.shape[:split]


def read_matrix(variables: Mapping[str, Any], path: tuple[str, ...], site: LinenSite) -> jax.Array:
    """A weight as ``[*batch, d_in, d_out]``."""
    stack_shape(variables, path, site)
    return to_matrix(_leaf(variables, path, site), site.spec)


def with_matrices(
    variables: Mapping[str, Any], matrices: Sequence[tuple[LinenSite, jax.Array]]
) -> dict[str, Any]:
    """The variables with other weights, given as matrices ``[..., d_in, d_out]``."""
    from flax.core import unfreeze

    if not matrices:
        return dict(variables)
    params = unfreeze(variables["params"])
    for site, matrix in matrices:
        node = params
        for name in site.scope:
            node = node[name]
        boxed = node[site.weight]
        old = nn.meta.unbox(boxed)
        new = from_matrix(matrix, site.spec, like=old).astype(old.dtype)
        is_box = isinstance(boxed, nn.meta.AxisMetadata)
        node[site.weight] = boxed.replace_boxed(new) if is_box else new
    return {**variables, "params": params}


def layer_parts(
    trees: tuple[Any, Any], method: Any, path: tuple[str, ...], matrix: jax.Array
) -> tuple[Arrays, Arrays]:
    """An adapter's arrays in one stack of layers: its own as ``[L, ...]``, and shared ones."""
    own, batch = groups.layers_of(*trees).get(path, {}), matrix.ndim - 2
    flat = {name: x.reshape(-1, *x.shape[batch:]) for name, x in own.items()}
    shared = groups.shared_of(*trees)
    return flat, groups.with_shared(method, {}, shared, "/".join(path), matrix.shape)


def _leaf(variables: Mapping[str, Any], path: tuple[str, ...], site: LinenSite) -> jax.Array:
    if "params" not in variables:
        known = ", ".join(map(repr, variables)) or "nothing"
        raise ValueError(
            f"variables has no collection 'params': it has {known}. Pass {{'params': params}}, "
            "as module.init returns it."
        )
    node = variables["params"]
    try:
        for name in (*site.scope, site.weight):
            node = node[name]
    except KeyError:
        raise ValueError(
            f"the layer {'/'.join(path)} has no {site.weight!r} in the variables: they are those "
            "of another model."
        ) from None
    return nn.meta.unbox(node)
