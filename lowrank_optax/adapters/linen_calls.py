"""Calls of a Linen model: finding its layers, and running it with adapters.

Layers are found by watching one abstract call: Linen's exist only while the model runs. The arrays
of adapters travel inside the collection ``params``, each layer's in the scope of its weight, so
that whatever the model does with its parameters happens to them too: a scan or vmap over layers
cuts both into layers, nn.jit and nn.remat pass both.
"""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import itertools
from typing import Any, TypeAlias
import zlib

from flax import linen as nn
from flax.core import unfreeze
import jax

from lowrank_optax.adapters import groups
from lowrank_optax.adapters.base import Adapter, Arrays
from lowrank_optax.adapters.folding import check_call
from lowrank_optax.adapters.layer_calls import Part, adapted_output, on_derivative, view_call, warn
from lowrank_optax.adapters.linen_variables import (
    Attached,
    Layers,
    LinenLayer,
    Variables,
    adapters_in,
    trees_of,
    weight_of,
)
from lowrank_optax.compat.flax import is_lifted_call, run_traced_apart
from lowrank_optax.matrices.flax_layers import Kernel, kernel_axes
from lowrank_optax.matrices.selection import Path
from lowrank_optax.matrices.views import to_matrix
from lowrank_optax.modules.spec import (
    BESIDE,
    LayerSpec,
    has_other_weights,
    kernel_spec,
    kind_of,
    usable_weight,
)


def find_layers(
    module: nn.Module,
    variables: Variables | None,
    rngs: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Layers:
    """The layers that a call of a model goes through, by path; nothing is computed.

    The path is that of the module, and the weight's name if it has several. A weight used in two
    ways (its axes once inputs and once outputs) is left out: no one adapter fits both.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    # Only shapes become tracers: a flag must stay one that Python can read.
    shapes = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)}
    found: dict[Path, LinenLayer | None] = {}
    others: dict[Path, str] = {}

    def watch(
        call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        module = context.module
        if module.scope is not None and has_other_weights(module):
            others[tuple(module.path)] = type(module).__name__
        y = call(*args, **kwargs)
        read = _read_call(context, args, kwargs)
        if read is not None:
            spec, weight = read
            unbound = module.clone(parent=None, name=None)
            layer = LinenLayer(tuple(module.path), spec, tuple(weight.shape), unbound)
            key = (*layer.scope, spec.weight)
            before = found.setdefault(key, layer)
            if before is not None and (before.shape, before.spec.axes) != (layer.shape, spec.axes):
                found[key] = None
        return y

    def abstract(shaped: dict[int, Any]) -> Any:
        whole = [shaped.get(i, x) for i, x in enumerate(leaves)]
        own_args, own_kwargs = jax.tree.unflatten(tree, whole)
        return run_traced_apart(module, variables, rngs, *own_args, **own_kwargs)

    # Blocks of one class under nn.jit are traced apart: a trace that is reused calls no layers.
    with nn.intercept_methods(watch):
        jax.eval_shape(abstract, shapes)
    around = lambda scope: (others.get(scope[:n], "") for n in range(len(scope) + 1))
    usable = [
        layer._replace(other_weights=next(filter(None, around(layer.scope)), ""))
        for layer in found.values()
        if layer is not None
    ]
    scopes = [x.scope for x in usable]
    return {x.scope if scopes.count(x.scope) == 1 else (*x.scope, x.spec.weight): x for x in usable}


def _read_call(
    context: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[LayerSpec, jax.Array] | None:
    """The layer whose method has just been called, and its weight; None for other modules."""
    module = context.module
    # A lifted call runs the layer proper, which is seen too: there the weight has its own axes.
    if context.method_name != "__call__" or module.scope is None or is_lifted_call(type(module)):
        return None
    kernel = usable_weight(module)
    if kernel is None:
        return _called_einsum(module, args, kwargs)
    weight = nn.meta.unbox(module.get_variable("params", kernel.path[0]))
    if weight is None or weight.ndim != len(kernel.shape):
        return None
    return kernel_spec(kernel, kind_of(module) or "einsum"), weight


def _called_einsum(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[LayerSpec, jax.Array] | None:
    """A layer that was called with an equation, as Flax's and Gemma's einsums are.

    Its weight is the one array of two axes or more that it has. Modules that share a scope see each
    other's arrays: then one of the module's fields says which is meant (Gemma's ``weight_name``).
    """
    equations = [a for a in (*args, *kwargs.values()) if isinstance(a, str) and "->" in a]
    equation = equations[0] if equations else getattr(module, "einsum_str", None)
    if not isinstance(equation, str) or equation.count(",") != 1:
        return None
    unboxed = nn.meta.unbox(dict(module.variables.get("params", {})))
    arrays = {n: x for n, x in unboxed.items() if getattr(x, "ndim", 0) > 1}
    fields = [x for x in vars(module).values() if isinstance(x, str) and x in arrays]
    names = fields or (["kernel"] if "kernel" in arrays else list(arrays))
    if len(names) != 1:
        return None
    weight = arrays[names[0]]
    letters = equation.replace(" ", "").split("->")[0].split(",")[1]
    reduction, output = kernel_axes(equation, weight.ndim)
    if len(letters) != weight.ndim or "." in letters or not reduction or not output:
        return None
    kernel = Kernel((names[0],), tuple(weight.shape), reduction, output)
    return kernel_spec(kernel, "einsum"), weight


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one adapter does in one layer.

    Attributes:
      name: The adapter's name.
      layer: The layer's path if arrays are shared, which tells its group. Empty else: layers of
        blocks under ``nn.jit`` then share a trace.
      method: The method with the rank of this layer.
      strength: What its change is multiplied by; None if it is switched off.
      call: A number of this call of the model if arrays are shared, else 0. Shared arrays are
        closed over, so a layer under ``nn.jit`` must be traced again in another call.
    """

    name: str
    layer: str
    method: Adapter
    strength: float | None
    call: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beside:
    """The adapters of one weight: ``arrays[adapter][name]``, keys for dropout, and plans."""

    arrays: dict[str, dict[str, jax.Array]]
    keys: dict[str, jax.Array]
    plans: tuple[_Plan, ...] = dataclasses.field(metadata={"static": True})


Shared: TypeAlias = Mapping[str, Mapping[str, Arrays]]  # adapter -> group -> name -> array

_calls = itertools.count(1)


def drops(attached: Attached) -> bool:
    return attached.strength is not None and getattr(attached.method, "dropout", 0) > 0


def beside_weights(
    adapters: Mapping[str, Attached], layers: Layers, variables: Variables, key: Any
) -> tuple[dict[Path, _Beside], Shared]:
    """What a call needs of each adapted layer, by path, and the arrays that layers share."""
    there = adapters_in(variables)
    missing = [n for n, a in adapters.items() if n not in there and a.strength is not None]
    if missing:
        raise ValueError(
            f"the variables have no arrays of the adapter {missing[0]!r}: make them by `init` or "
            "`attach`, or call `deactivate` first, or the module itself."
        )
    arrays: dict[Path, dict[str, dict[str, jax.Array]]] = {}
    shared: dict[str, dict[str, Arrays]] = {}
    for name in (n for n in adapters if there.get(n) is False):
        trees = trees_of(variables, name)
        for path, own in groups.layers_of(*trees).items():
            arrays.setdefault(path, {})[name] = own
        if of_groups := groups.shared_of(*trees):
            shared[name] = of_groups
    call, beside = next(_calls) if shared else 0, {}
    for path, by_name in arrays.items():
        keys, plans = {}, []
        for name in by_name:
            attached, layer = adapters[name], "/".join(path)
            at = layer if shared else ""
            plans.append(_Plan(name, at, attached.at(path), attached.strength, call))
            if key is not None and drops(attached) and path in layers:
                own = jax.random.fold_in(key, zlib.crc32(f"{name}:{layer}".encode()))
                stack = layers[path].spec.stack(weight_of(variables, path, layers[path]).shape)
                keys[name] = jax.random.split(own, stack) if stack else own
        beside[path] = _Beside(by_name, keys, tuple(plans))
    return beside, shared


def put_beside(params: Any, layers: Mapping[Path, _Beside]) -> dict[str, Any]:
    """The collection ``params`` with the adapters of each layer beside its weight.

    Raises:
      ValueError: If there is no such layer.
    """
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


def interceptor(shared: Shared) -> Callable[..., Any]:
    """What applies the adapters after each call of a layer; for ``nn.intercept_methods``."""
    seen: collections.Counter[tuple[str, Path]] = collections.Counter()
    running: set[Path] = set()

    def key_of(module: nn.Module, beside: _Beside, plan: _Plan) -> jax.Array | None:
        if plan.name not in beside.keys:
            return None
        if module.has_rng("dropout"):
            return module.make_rng("dropout")
        # A scan that does not split the stream hides it, but not what is beside its weights.
        seen[plan.name, module.path] += 1
        return jax.random.fold_in(beside.keys[plan.name], seen[plan.name, module.path] - 1)

    def intercept(
        call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        module = context.module
        if module.scope is None or context.method_name != "__call__":
            return call(*args, **kwargs)
        there = module.get_variable("params", BESIDE)
        read = _read_call(context, args, kwargs) if there else None
        beside = None if read is None else there.get(read[0].weight, there.get(""))
        if read is None or beside is None:
            return call(*args, **kwargs)
        spec, weight = read
        layer = (*module.path, spec.weight)
        if layer in running:  # a subclass calls its base class, which is intercepted as well
            return call(*args, **kwargs)
        check_call(module, [p.method for p in beside.plans if p.strength is not None], module.path)
        running.add(layer)
        try:
            y = call(*args, **kwargs)
        finally:
            running.remove(layer)
        matrix = to_matrix(weight, spec.axes)
        view = view_call(module, spec.kind, weight, args, kwargs, y)
        bias = nn.meta.unbox(module.get_variable("params", "bias"))
        bias = None if bias is None else view.bias(bias)
        parts = []
        for plan in beside.plans:
            own, of_group = beside.arrays.get(plan.name, {}), shared.get(plan.name, {})
            p = groups.with_shared(plan.method, own, of_group, plan.layer, matrix.shape)
            parts.append(Part(plan.method, p, plan.strength, key_of(module, beside, plan)))
        out = adapted_output(parts, view.x, view.rows(y), weight=matrix, bias=bias)
        return on_derivative(warn, _FROZEN_WEIGHT, view.unrows(out).astype(y.dtype), weight)

    return intercept


_FROZEN_WEIGHT = (
    "a gradient by the frozen weight of a layer with adapters is asked for: take gradients of the "
    "collection 'adapters' alone, and make the optimizer's state for it alone."
)
