"""Making the arrays of a Linen model's adapters, and laying them beside the weights for a call."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from lowrank_optax.adapters import groups, linen_calls, linen_variables
from lowrank_optax.adapters.base import Adapter, Arrays
from lowrank_optax.adapters.groups import KIND
from lowrank_optax.adapters.linen_sites import LinenSite, Sites
from lowrank_optax.adapters.low_rank import LowRank
from lowrank_optax.matrices.selection import Path, Where
from lowrank_optax.modules.select import select


class Attached(NamedTuple):
    """One adapter of an `Adapted`: its arguments, and its strength (None: switched off)."""

    method: Adapter
    where: Where
    rank_pattern: Mapping[str, int | tuple[int, ...]]
    alpha_pattern: Mapping[str, float]
    strength: float | None = 1.0

    def at(self, path: tuple[str, ...]) -> Adapter:
        """The method of one layer."""
        return groups.method_at(self.method, "/".join(path), self.rank_pattern, self.alpha_pattern)


def attach(
    adapters: Mapping[str, Attached], sites: Sites, variables: Mapping[str, Any], key: jax.Array
) -> dict[str, Any]:
    """The variables with those of adapters that have none yet."""
    there = linen_variables.adapters_in(variables)
    for number, (name, attached) in enumerate(adapters.items()):
        if name not in there:
            of_adapter = jax.random.fold_in(key, number)
            variables = _attach_one(attached, sites, variables, name, of_adapter)
    return dict(variables)


def wants_keys(adapters: Mapping[str, Attached], rngs: Any) -> bool:
    """Whether some adapter is to drop inputs in this call."""
    given = isinstance(rngs, Mapping) and "dropout" in rngs
    return given and any(_drops(a) for a in adapters.values())


def beside_weights(
    adapters: Mapping[str, Attached], sites: Sites, variables: Mapping[str, Any], rngs: Any
) -> tuple[dict[Path, linen_calls.Beside], linen_calls.Shared]:
    """What a call needs of each adapted layer, by path, and the arrays that layers share."""
    there = linen_variables.adapters_in(variables)
    missing = [n for n, a in adapters.items() if n not in there and a.strength is not None]
    if missing:
        raise ValueError(
            f"the variables have no arrays of the adapter {missing[0]!r}: make them by `init` or "
            "`attach`, or call `deactivate` first, or the module itself."
        )
    arrays: dict[Path, dict[str, dict[str, jax.Array]]] = {}
    shared: dict[str, dict[str, Arrays]] = {}
    for name in adapters:
        trees = linen_variables.arrays_of(variables, name)
        for path, own in groups.layers_of(*trees).items():
            arrays.setdefault(path, {})[name] = own
        if of_groups := groups.shared_of(*trees):
            shared[name] = of_groups
    call = linen_calls.call_number(bool(shared))
    key = rngs["dropout"] if wants_keys(adapters, rngs) else None
    beside = {}
    for path, by_name in arrays.items():
        layer = "/".join(path)
        keys, plans = {}, []
        for name in by_name:
            attached = adapters[name]
            plans.append(linen_calls.Plan(name, layer, attached.at(path), attached.strength, call))
            if key is not None and _drops(attached) and path in sites:
                stack = linen_variables.stack_shape(variables, path, sites[path])
                keys[name] = linen_calls.dropout_keys(key, name, layer, stack)
        beside[path] = linen_calls.Beside(by_name, keys, tuple(plans))
    return beside, shared


def _drops(attached: Attached) -> bool:
    method = attached.method
    return attached.strength is not None and isinstance(method, LowRank) and method.dropout > 0


def _attach_one(
    attached: Attached, sites: Sites, variables: Mapping[str, Any], name: str, key: jax.Array
) -> dict[str, Any]:
    modules = {path: site.module for path, site in sites.items()}
    default = [p for p, s in sites.items() if s.kernel.by_default and not s.embedding]
    paths = list(select(modules, attached.where, KIND, default=default))
    stacks = [_stack(variables, path, sites[path]) for path in paths]
    patterns = attached.rank_pattern, attached.alpha_pattern
    trees = groups.init_trees(key, attached.method, stacks, *patterns)
    bases = [(sites[path], base) for path, base in trees.base.items()]
    variables = linen_variables.with_matrices(variables, bases)
    return linen_variables.with_arrays(variables, name, trees.trainable, trees.frozen)


def _stack(variables: Mapping[str, Any], path: Path, site: LinenSite) -> groups.Stack:
    matrices = linen_variables.read_matrix(variables, path, site)
    return groups.Stack(path, matrices, site.embedding)
