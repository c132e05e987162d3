"""Running a Linen model with the arrays of its adapters beside its weights.

The arrays travel inside the collection ``params``, each layer's in the scope of its weight, so that
whatever the model does with its parameters happens to them too: a scan or vmap over layers cuts
both into layers, ``nn.jit`` and ``nn.remat`` pass both. An interceptor finds them there after a
layer has run.
"""

from collections.abc import Callable, Mapping
import dataclasses
import itertools
from typing import Any
import zlib

from flax import linen as nn
import jax
import jax.numpy as jnp

from lowrank_optax.adapters import groups
from lowrank_optax.adapters.base import Adapter, Arrays
from lowrank_optax.adapters.calls import view_call
from lowrank_optax.adapters.derivatives import warn_of_derivative
from lowrank_optax.adapters.linen_sites import from_the_end, read_call
from lowrank_optax.adapters.outputs import Part, adapted_output
from lowrank_optax.matrices.views import to_matrix
from lowrank_optax.modules.spec import kind_of

BESIDE = "lowrank_adapters"
"""Name of what is put beside the weights."""

_FROZEN_WEIGHT = (
    "a gradient by the frozen weight of a layer with adapters is asked for: take gradients of the "
    "collection 'adapters' alone, and make the optimizer's state for it alone."
)

_calls = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one adapter does in one layer.

    Attributes:
      name: The adapter's name.
      layer: The layer's path.
      method: The method with the rank of this layer.
      strength: What its change is multiplied by; None if it is switched off.
      call: A number of this call of the model if arrays are shared, else 0. A layer under
        ``nn.jit`` is traced again if it differs: shared arrays are closed over, and those of
        another call would be stale.
    """

    name: str
    layer: str
    method: Adapter
    strength: float | None
    call: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beside:
    """The adapters of one weight: ``arrays[adapter][name]``, keys for dropout, and plans."""

    arrays: dict[str, dict[str, jax.Array]]
    keys: dict[str, jax.Array]
    plans: tuple[Plan, ...] = dataclasses.field(metadata={"static": True})


Shared = Mapping[str, Mapping[str, Arrays]]  # adapter -> group -> name -> array


def put_beside(params: Any, layers: Mapping[tuple[str, ...], Beside]) -> dict[str, Any]:
    """The collection ``params`` with the adapters of each layer beside its weight.

    Raises:
      ValueError: If there is no such layer.
    """
    from flax.core import unfreeze

    whole = unfreeze(params)
    for path, beside in layers.items():
        *scope, last = path or ("",)
        node = whole
        try:
            for name in scope:
                node = node[name]
            inside = path and isinstance(node[last], dict)
        except (KeyError, TypeError):
            raise ValueError(
                f"there are adapter arrays for {'/'.join(path)!r}, which is not in params."
            ) from None
        # A path that ends at an array names one of several weights of a scope.
        target, weight = (node[last], "") if inside else (node, last)
        target.setdefault(BESIDE, {})[weight] = beside
    return whole


def take_away(tree: Any) -> Any:
    """The collection without what `put_beside` has put there."""
    if isinstance(tree, Mapping):
        return {k: take_away(v) for k, v in tree.items() if k != BESIDE}
    return tree


def call_number(shares: bool) -> int:
    """See `Plan.call`."""
    return next(_calls) if shares else 0


def dropout_keys(key: jax.Array, name: str, layer: str, stack: tuple[int, ...]) -> jax.Array:
    """A key for each layer of a stack: typed, of shape ``stack``."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    own = jax.random.fold_in(key, zlib.crc32(f"{name}:{layer}".encode()))
    return jax.random.split(own, stack) if stack else own


def interceptor(shared: Shared) -> Callable[..., Any]:
    """What applies the adapters after each call of a layer; for ``nn.intercept_methods``."""
    seen: dict[tuple[str, str], int] = {}

    def intercept(
        next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        y = next_fun(*args, **kwargs)
        module = context.module
        if module.scope is None or context.method_name != "__call__":
            return y
        there = module.get_variable("params", BESIDE)
        read = read_call(context, args, kwargs) if there else None
        if read is None:
            return y
        beside = there.get(read[0].path[0], there.get(""))
        return (
            y if beside is None else _changed(module, beside, shared, seen, args, kwargs, y, read)
        )

    return intercept


def _changed(
    module: nn.Module,
    beside: Beside,
    shared: Shared,
    seen: dict[tuple[str, str], int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    y: jax.Array,
    read: tuple[Any, jax.Array],
) -> jax.Array:
    """The layer's output with its adapters."""
    kernel, weight = read
    matrix = to_matrix(weight, from_the_end(kernel))
    bias = nn.meta.unbox(module.get_variable("params", "bias"))
    if bias is not None:
        bias = bias.reshape(*matrix.shape[:-2], 1, -1) if matrix.ndim > 2 else bias.reshape(-1)
    call = view_call(module, kind_of(module) or "einsum", weight, args, kwargs, y)
    parts = []
    for plan in beside.plans:
        own, of_group = beside.arrays.get(plan.name, {}), shared.get(plan.name, {})
        p = groups.with_shared(plan.method, own, of_group, plan.layer, matrix.shape)
        parts.append(Part(plan.method, p, plan.strength, _key(module, beside, plan, seen)))
    out = adapted_output(parts, call.x, call.rows(y), weight=matrix, bias=bias)
    return warn_of_derivative(_FROZEN_WEIGHT, call.unrows(out).astype(y.dtype), weight)


def _key(
    module: nn.Module, beside: Beside, plan: Plan, seen: dict[tuple[str, str], int]
) -> jax.Array | None:
    """The key of dropout in this call of this layer; None without a key for ``dropout``."""
    if plan.name not in beside.keys:
        return None
    if module.has_rng("dropout"):
        return module.make_rng("dropout")
    # A scan that does not split the stream hides it, but not what lies beside its weights.
    times = seen[plan.name, plan.layer] = seen.get((plan.name, plan.layer), -1) + 1
    return jax.random.fold_in(beside.keys[plan.name], times)
