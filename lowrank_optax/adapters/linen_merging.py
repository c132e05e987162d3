"""Folding the adapters of a Linen model into its parameters, taking them away, and a summary."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.adapters import groups, linen_variables
from lowrank_optax.adapters.base import Arrays, counts_of, parameter_count
from lowrank_optax.adapters.folding import (
    MergedLayer,
    MergeReport,
    Methods,
    check_can_unmerge,
    check_unchanged,
    checksum,
    folded,
    unfolded,
)
from lowrank_optax.adapters.linen_attaching import Attached
from lowrank_optax.adapters.linen_sites import LinenSite, Sites
from lowrank_optax.adapters.summaries import AdapterSummary, SummaryRow, row_of
from lowrank_optax.matrices.selection import Path

_Adapters = Mapping[str, Attached]


class _Layer(NamedTuple):
    """A layer that has some of the adapters, and its weights ``[*batch, d_in, d_out]``."""

    path: Path
    site: LinenSite
    matrix: jax.Array
    names: list[str]

    def parts(
        self, adapters: _Adapters, trees: Mapping[str, Any], names: Sequence[str]
    ) -> tuple[Methods, jax.Array, tuple[Arrays, ...], tuple[Arrays, ...]]:
        """What `folded` and `unfolded` take."""
        methods = tuple((adapters[n].at(self.path), strength_of(adapters[n])) for n in names)
        of = [
            linen_variables.layer_parts(trees[n], method, self.path, self.matrix)
            for n, (method, _) in zip(names, methods, strict=True)
        ]
        stack = self.matrix.reshape(-1, *self.matrix.shape[-2:])
        return methods, stack, tuple(own for own, _ in of), tuple(shared for _, shared in of)

    def checksums(
        self, adapters: _Adapters, trees: Mapping[str, Any], names: Sequence[str]
    ) -> dict[str, jax.Array]:
        """By adapter, uint32 with the axes of the stack."""
        methods, stack, *both = self.parts(adapters, trees, names)
        batch = self.matrix.shape[:-2]
        whole = lambda x: jnp.broadcast_to(x, stack.shape[:1]).reshape(batch)
        return {
            name: whole(checksum(strength, own, shared))
            for name, (_, strength), own, shared in zip(names, methods, *both, strict=True)
        }


def strength_of(attached: Attached) -> float:
    """Its strength, also where it is switched off."""
    return 1.0 if attached.strength is None else attached.strength


def merge(
    adapters: _Adapters, sites: Sites, variables: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, Any], MergeReport]:
    """See `Adapted.merge`."""
    merged = linen_variables.adapters_in(variables)
    active = [n for n in names if adapters[n].strength is not None]
    wanted = [n for n in active if merged.get(n) is False]
    if not wanted:
        raise ValueError(f"none of the adapters {list(names)} is active and not merged yet.")
    trees = _trees(adapters, variables)
    rows, new = [], []
    numbers: dict[str, dict[str, jax.Array]] = {name: {} for name in wanted}
    for layer in _layers(sites, variables, trees):
        together = [n for n in layer.names if n in wanted or merged[n]]
        path, now = "/".join(layer.path), [n for n in layer.names if n in wanted]
        if not now:
            continue
        named = [(n, adapters[n].at(layer.path), strength_of(adapters[n])) for n in together]
        check_can_unmerge(path, named)
        weights, error, size = folded(*layer.parts(adapters, trees, now))
        rows.append(MergedLayer(path, error, size))
        new.append((layer.site, weights))
        for name, number in layer.checksums(adapters, trees, now).items():
            numbers[name][path] = number
    result = linen_variables.with_matrices(variables, new)
    for name in wanted:
        checksums = numbers[name]
        result = linen_variables.with_arrays(result, name, *trees[name], checksums=checksums)
    return result, MergeReport(rows)


def unmerge(
    adapters: _Adapters, sites: Sites, variables: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """See `Adapted.unmerge`."""
    merged = linen_variables.adapters_in(variables)
    wanted = [n for n in names if merged.get(n)]
    if not wanted:
        raise ValueError(f"nothing to unmerge: none of {list(names)} is merged.")
    trees = _trees(adapters, variables)
    new = []
    for layer in _layers(sites, variables, trees):
        now = [n for n in layer.names if n in wanted]
        if now:
            path = "/".join(layer.path)
            for name, number in layer.checksums(adapters, trees, now).items():
                before = variables[linen_variables.MERGED][name][linen_variables.CHECKSUMS]
                check_unchanged(path, name, before[path], number)
            new.append((layer.site, unfolded(*layer.parts(adapters, trees, now))))
    result = linen_variables.with_matrices(variables, new)
    for name in wanted:
        result = linen_variables.with_arrays(result, name, *trees[name])
    return result


def detach(
    adapters: _Adapters, sites: Sites, variables: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """See `Adapted.detach`."""
    merged, trees = linen_variables.adapters_in(variables), _trees(adapters, variables)
    result = dict(variables)
    changed = [n for n in names if adapters[n].method.changes_base and merged.get(n) is False]
    for name in changed:
        new = []
        for layer in _layers(sites, result, {name: trees[name]}):
            ((method, _),), stack, (own,), (shared,) = layer.parts(adapters, trees, [name])
            one = lambda x, w, m=method, s=shared: m.original({**x, **s}, w)
            new.append((layer.site, jax.vmap(one)(own, stack)))
        result = linen_variables.with_matrices(result, new)
    return linen_variables.without_arrays(result, names)


def summary(adapters: _Adapters, sites: Sites, variables: Mapping[str, Any]) -> AdapterSummary:
    """See `Adapted.summary`."""
    merged, trees = linen_variables.adapters_in(variables), _trees(adapters, variables)
    rows, of_groups = [], []
    for layer in _layers(sites, variables, trees, shapes=True):
        for name in layer.names:
            state = "merged" if merged[name] else adapters[name].strength
            counts = counts_of(*(groups.layers_of(t, {}).get(layer.path, {}) for t in trees[name]))
            method = adapters[name].at(layer.path)
            path = "/".join(layer.path)
            rows.append(row_of(path, layer.matrix.shape, name, method, counts, state))
    for name in merged:
        for group in groups.shared_of(*trees[name]):
            counts = counts_of(*(groups.shared_of(t, {}).get(group, {}) for t in trees[name]))
            label = f"adapter_groups/{name}/{group}"
            of_groups.append(SummaryRow(label, "–", name, "shared", None, *counts, ""))
    return AdapterSummary(rows + of_groups, parameter_count(variables.get("params", {})))


def _trees(adapters: _Adapters, variables: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The arrays of each adapter that is there."""
    read = {False: linen_variables.arrays_of, True: linen_variables.merged_arrays_of}
    there = linen_variables.adapters_in(variables)
    return {n: read[merged](variables, n) for n, merged in there.items() if n in adapters}


def _layers(
    sites: Sites,
    variables: Mapping[str, Any],
    trees: Mapping[str, tuple[Any, Any]],
    *,
    shapes: bool = False,
) -> Iterator[_Layer]:
    """The layers that have some of these adapters; with their weights' shapes alone if wanted."""
    of_adapter = {name: groups.layers_of(*both) for name, both in trees.items()}
    for path, site in sites.items():
        names = [name for name, layers in of_adapter.items() if path in layers]
        if names:
            read = lambda v, p=path, s=site: linen_variables.read_matrix(v, p, s)
            matrix = jax.eval_shape(read, variables) if shapes else read(variables)
            yield _Layer(path, site, matrix, names)
