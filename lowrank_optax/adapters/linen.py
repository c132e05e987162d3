"""Adapters on a Flax Linen model: a facade around a module that stays as it is.

Arrays of adapters are in collections of their own, ``adapters`` and ``adapter_constants``, so the
model's parameters keep their paths, and gradients are taken of ``variables["adapters"]`` alone.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import copy
import dataclasses
import itertools
from typing import Any, NamedTuple, TypeAlias
import zlib

from flax import linen as nn
from flax.core import unfreeze
import jax
import jax.numpy as jnp

from lowrank_optax.adapters import groups
from lowrank_optax.adapters.base import Adapter, Arrays, counts_of, parameter_count
from lowrank_optax.adapters.folding import (
    Folding,
    MergedLayer,
    MergeReport,
    check_call,
    check_can_unmerge,
    needs_weight,
    other_weights_error,
)
from lowrank_optax.adapters.layer_calls import Part, adapted_output, on_derivative, view_call, warn
from lowrank_optax.adapters.summaries import AdapterSummary, SummaryRow, row_of
from lowrank_optax.compat.flax import is_lifted_call, run_traced_apart
from lowrank_optax.matrices.flax_layers import Kernel, kernel_axes
from lowrank_optax.matrices.selection import Path, Where
from lowrank_optax.matrices.views import from_matrix, to_matrix
from lowrank_optax.modules.select import select
from lowrank_optax.modules.spec import (
    BESIDE,
    LayerSpec,
    has_other_weights,
    kernel_spec,
    kind_of,
    usable_weight,
    without_beside,
)

__all__ = ["Adapted"]

Variables: TypeAlias = Mapping[str, Any]

TRAINED, CONSTANTS, MERGED = "adapters", "adapter_constants", "merged_adapters"
"""Collections: arrays that are trained, arrays that are not, and both of adapters merged."""

_CHECKSUMS = "checksums"  # beside the arrays of a merged adapter: see `Folding.checksums`


class Attached(NamedTuple):
    """One adapter of an `Adapted`: its arguments, and its strength (None: switched off)."""

    method: Adapter
    where: Where
    rank_pattern: Mapping[str, int | tuple[int, ...]]
    alpha_pattern: Mapping[str, float]
    strength: float | None = 1.0

    def at(self, path: Path) -> Adapter:
        """The method of one layer."""
        return groups.method_at(self.method, "/".join(path), self.rank_pattern, self.alpha_pattern)


class Adapted:
    """A Linen module with an adapter. The module is not touched: `apply` intercepts its layers.

    Layers are found by watching one abstract call, so `init` and `attach` take the inputs of the
    model. Adapted can be Flax's ``Dense``, ``DenseGeneral``, ``Einsum``, ``Conv`` and ``Embed``
    (when called), wherever they are: in ``setup`` or ``@nn.compact``, in an attention, under
    ``nn.scan``, ``nn.vmap``, ``nn.remat`` and ``nn.jit``; and layers of other packages that have
    one weight and are called with an equation, as Gemma's. Stacked layers get stacked arrays.

    Variables are those of the module (``params`` and others, unchanged) and

    - ``adapters``: ``adapters/NAME/PATH/ARRAY``, what is trained; arrays that layers share are
      ``adapters/NAME/adapter_groups/GROUP/ARRAY``;
    - ``adapter_constants``: likewise, what is not;
    - ``merged_adapters``: both, of adapters that are folded into ``params``.

    Inputs are dropped in calls that are given a key for ``dropout``. Several adapters: an `Adapted`
    of an `Adapted`.

    Args:
      module: Any Linen module, or an `Adapted` to which this adapter is added.
      method: What to attach, for example ``lro.adapters.LoRA(rank=8)``.
      where: Which layers: a regular expression found in a path such as ``blocks/attention/query``
        (or a list), a class of layers, a function of path and (unbound) module; None for all linear
        layers except embeddings and output heads.
      name: The adapter's name.
      rank_pattern: Other ranks for layers by regular expressions found in their paths, the first
        that is found counting; a tuple has one for each layer of a stack.
      alpha_pattern: Likewise other values of ``alpha``.

    Raises:
      TypeError: If ``method`` is not an adapter.
      ValueError: If ``module`` has an adapter of this name.

    Example:
      >>> from flax import linen as nn
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
      >>> adapted = lro.adapters.linen.Adapted(model, lro.adapters.LoRA(rank=1), "layers_0")
      >>> variables, x = model.init(jax.random.key(0), jnp.ones(3)), jnp.ones(3)
      >>> variables = adapted.attach(variables, jax.random.key(1), x)
      >>> print(jax.tree.map(jnp.shape, variables["adapters"]))
      {'default': {'layers_0': {'A': (3, 1), 'B': (1, 4)}}}
      >>> print(bool((adapted.apply(variables, x) == model.apply(variables, x)).all()))
      True

    Reference:
      Interception of calls: https://flax-linen.readthedocs.io (``flax.linen.intercept_methods``).
    """

    def __init__(
        self,
        module: "nn.Module | Adapted",
        method: Adapter,
        where: Where = None,
        *,
        name: str = "default",
        rank_pattern: Mapping[str, int | tuple[int, ...]] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
    ) -> None:
        groups.check_method(method)
        self.module: nn.Module
        self.adapters: dict[str, Attached] = {}
        self._layers: Layers = {}
        if isinstance(module, Adapted):
            self.module, self.adapters, self._layers = (
                module.module,
                module.adapters,
                module._layers,
            )
        else:
            self.module = module
        if name in self.adapters:
            raise ValueError(f"name={name!r}: the module has an adapter of this name already.")
        attached = Attached(method, where, rank_pattern or {}, alpha_pattern or {})
        self.adapters = {**self.adapters, name: attached}

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All variables: those of ``module.init`` and those of the adapters.

        Args:
          rngs: As for ``module.init``; the adapters' key is that of ``adapters``, if there is one,
            else made from that of ``params``.
          args: Positional arguments of the model.
          kwargs: Likewise, with ``method``.
        """
        variables = self.module.init(rngs, *args, **kwargs)
        self.trace(*args, rngs=rngs, **kwargs)
        if isinstance(rngs, Mapping) and TRAINED in rngs:
            return self._attach(variables, rngs[TRAINED])
        key = rngs["params"] if isinstance(rngs, Mapping) else rngs
        return self._attach(variables, jax.random.fold_in(key, zlib.crc32(TRAINED.encode())))

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """The output of a first call, and all variables as before it; see `init`."""
        variables = self.init(rngs, *args, **kwargs)
        rngs = rngs if isinstance(rngs, Mapping) else {"params": rngs}
        output, _ = self.apply(variables, *args, rngs=rngs, mutable=True, **kwargs)
        return output, variables

    def attach(
        self, variables: Mapping[str, Any], key: jax.Array, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The variables with those of adapters that have none yet.

        Args:
          variables: Variables of the module, for example pretrained ones: they stay as they are,
            except where a method changes weights (PiSSA).
          key: PRNG key.
          args: Positional arguments of the model: arrays or ``jax.ShapeDtypeStruct``; nothing is
            computed. Not needed if `init` or `trace` has been called.
          kwargs: Likewise; with ``method`` and ``rngs`` as for ``module.init``.

        Raises:
          ValueError: If ``where`` matches no layer (the message lists near ones), a pattern matches
            none of the layers chosen, or the variables are not those of this module.
        """
        if args or kwargs or not self._layers:
            self.trace(*args, **kwargs)
        return self._attach(variables, key)

    def _attach(self, variables: Variables, key: jax.Array) -> dict[str, Any]:
        there, variables = _adapters_in(variables), dict(variables)
        modules = {path: layer.module for path, layer in self._layers.items()}
        for number, (name, attached) in enumerate(self.adapters.items()):
            if name in there:
                continue
            kinds = {p: layer.spec for p, layer in self._layers.items()}
            default = [p for p, s in kinds.items() if s.by_default and s.kind != "embedding"]
            chosen = list(select(modules, attached.where, groups.KIND, default=default))
            if needs_weight(attached.method):
                for path in chosen:
                    self._check_weight(path, f"{type(attached.method).__name__} reads")
            stacks = [
                groups.Stack(path, self._matrix(variables, path), kinds[path].kind == "embedding")
                for path in chosen
            ]
            of_adapter = jax.random.fold_in(key, number)
            patterns = attached.rank_pattern, attached.alpha_pattern
            trees = groups.init_trees(of_adapter, attached.method, stacks, *patterns)
            bases = [(self._layers[path], base) for path, base in trees.base.items()]
            variables = _with_matrices(variables, bases)
            variables = _with_arrays(variables, name, (trees.trainable, trees.frozen))
        return variables

    def trace(self, *args: Any, rngs: Any = None, **kwargs: Any) -> None:
        """Finds the layers in one abstract call, as `init` and `attach` do.

        Args:
          args: Positional arguments of the model: arrays or ``jax.ShapeDtypeStruct``.
          rngs: As for ``module.init``, if it needs more than one key.
          kwargs: Keyword arguments of the model, with ``method``.
        """
        rngs = jax.random.key(0) if rngs is None else rngs
        self._layers = _find_layers(self.module, None, rngs, args, kwargs)

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        """The model with its active adapters: ``module.apply`` with the same arguments.

        Args:
          variables: What `init` or `attach` returned.
          args: Positional arguments of the model.
          rngs: As for ``module.apply``; with ``dropout``, adapters drop some of their inputs.
          mutable: As for ``module.apply``.
          kwargs: Keyword arguments of the model, with ``method`` and ``capture_intermediates``.

        Returns:
          What ``module.apply`` returns.

        Raises:
          ValueError: If there are arrays for a layer that is not in ``params``, no arrays of an
            active adapter, or arrays of one that is merged into ``params`` already.
        """
        own = {k: v for k, v in variables.items() if k not in (TRAINED, CONSTANTS, MERGED)}
        key = rngs.get("dropout") if isinstance(rngs, Mapping) else None
        if key is not None and any(map(_drops, self.adapters.values())):
            if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
                key = jax.random.wrap_key_data(key)
            if not self._layers:
                self._layers = _find_layers(self.module, own, rngs, args, kwargs)
        beside, shared = _beside_weights(self.adapters, self._layers, variables, key)
        if beside:
            own["params"] = _put_beside(own["params"], beside)
        with nn.intercept_methods(_interceptor(shared)):
            result = self.module.apply(own, *args, rngs=rngs, mutable=mutable, **kwargs)
        if mutable is False:
            return result
        output, updates = result
        return output, without_beside(updates)

    def activate(self, *names: str, strengths: Mapping[str, float] | None = None) -> "Adapted":
        """The same model with these adapters active and no others; see `lro.adapters.activate`.

        Args:
          names: Names of the adapters; without any, all.
          strengths: By name, what the change of an adapter is multiplied by; 1 for the others.
        """
        wanted, strengths = self._check_names(names), strengths or {}
        for name in strengths:
            if name not in wanted:
                raise ValueError(f"strengths has {name!r}, which is not among {wanted}.")
        strength = lambda n: float(strengths.get(n, 1.0)) if n in wanted else None
        return self._with({n: a._replace(strength=strength(n)) for n, a in self.adapters.items()})

    def deactivate(self, *names: str) -> "Adapted":
        """The same model without these adapters (or any); their variables may stay."""
        gone = self._check_names(names)
        off = {n: self.adapters[n]._replace(strength=None) for n in gone}
        return self._with({**self.adapters, **off})

    def merge(
        self, variables: Mapping[str, Any], name: str | None = None
    ) -> tuple[dict[str, Any], MergeReport]:
        """The variables with active adapters folded into ``params``, and a report.

        The arrays move to ``merged_adapters``, until `unmerge`. See `lro.adapters.merge`.

        Args:
          variables: What `init` or `attach` returned.
          name: Name of the adapter; None for all that are active.

        Raises:
          ValueError: If there is nothing to merge, or a change that depends on the weight (DoRA's)
            would have to be merged together with others or at a strength other than 1.
          TypeError: If an adapter has no matrix to add to the weight.
          RuntimeError: If the layers are not known yet: see `trace`.
        """
        names, there = self._check_names([name] if name else []), _adapters_in(variables)
        layers = self._adapted(variables)
        active = [n for n in names if self.adapters[n].strength is not None]
        wanted = [n for n in active if there.get(n) is False]
        if not wanted:
            raise ValueError(f"none of the adapters {names} is active and not merged yet.")
        rows, new = [], []
        checksums: dict[str, dict[str, jax.Array]] = {name: {} for name in wanted}
        for path, layer, of_layer in layers:
            now = [n for n in of_layer if n in wanted]
            if now:
                together = [n for n in of_layer if n in wanted or there[n]]
                label = "/".join(path)
                check_can_unmerge(label, [(n, *self._method(path, n)) for n in together])
                weights, row, numbers = self._fold(variables, path, now)
                rows.append(row)
                new.append((layer, weights))
                for n, checksum in numbers.items():
                    checksums[n][label] = checksum
        result = _with_matrices(variables, new)
        for n in wanted:
            result = _with_arrays(result, n, _trees_of(variables, n), checksums[n])
        return result, MergeReport(rows)

    def unmerge(self, variables: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
        """The variables with merged adapters taken out of ``params``, to the rounding of its dtype.

        Args:
          variables: What `merge` returned.
          name: Name of the adapter; None for all that are merged.

        Raises:
          ValueError: If none is merged, or one's arrays or strength have changed since `merge`.
          RuntimeError: If the layers are not known yet: see `trace`.
        """
        names, there = self._check_names([name] if name else []), _adapters_in(variables)
        layers, wanted = self._adapted(variables), [n for n in names if there.get(n)]
        if not wanted:
            raise ValueError(f"nothing to unmerge: none of {names} is merged.")
        new = []
        for path, layer, of_layer in layers:
            now = [n for n in of_layer if n in wanted]
            if now:
                merged, label = variables[MERGED], "/".join(path)
                before = {n: merged[n][_CHECKSUMS][label] for n in now}
                new.append((layer, self._unfold(variables, path, before)))
        result = _with_matrices(variables, new)
        for n in wanted:
            result = _with_arrays(result, n, _trees_of(variables, n))
        return result

    def detach(self, variables: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
        """The variables without those of the adapters: with ``name=None``, the module's own.

        What is merged stays in the weights. Where a method changed them when it was attached
        (PiSSA), the original ones come back, to the rounding of their dtype, unless it is merged.

        Args:
          variables: What `init`, `attach` or `merge` returned.
          name: Name of the adapter; None for all.
        """
        names, there = self._check_names([name] if name else []), _adapters_in(variables)
        result = dict(variables)
        for n in names:
            if self.adapters[n].method.changes_base and there.get(n) is False:
                new = []
                for path, layer, of_layer in self._adapted(result):
                    if n in of_layer:
                        new.append((layer, self._folding(result, path, [n]).original()))
                result = _with_matrices(result, new)
        return _without_arrays(result, names)

    def summary(self, variables: Mapping[str, Any]) -> AdapterSummary:
        """What is attached where, with counts and bytes: see `lro.adapters.summary`.

        Args:
          variables: What `init` or `attach` returned, or their shapes.
        """
        rows, there = [], _adapters_in(variables)
        trees = {name: _trees_of(variables, name) for name in there if name in self.adapters}
        for path, _, of_layer in self._adapted(variables):
            shape = jax.eval_shape(lambda v, p=path: self._matrix(v, p), variables).shape
            for name in of_layer:
                state = "merged" if there[name] else self.adapters[name].strength
                arrays = (groups.layers_of(t, {}).get(path, {}) for t in trees[name])
                method = self.adapters[name].at(path)
                rows.append(row_of("/".join(path), shape, name, method, arrays, state))
        for name, both in trees.items():
            for group in groups.shared_of(*both):
                counts = counts_of(*(groups.shared_of(t, {}).get(group, {}) for t in both))
                label = f"adapter_groups/{name}/{group}"
                rows.append(SummaryRow(label, "–", name, "shared", None, *counts, ""))
        return AdapterSummary(rows, parameter_count(variables.get("params", {})))

    def _with(self, adapters: dict[str, Attached]) -> "Adapted":
        new = copy.copy(self)
        new.adapters = adapters
        return new

    def _check_names(self, names: Sequence[str]) -> list[str]:
        for name in names:
            if name not in self.adapters:
                has = ", ".join(map(repr, self.adapters))
                raise ValueError(f"the model has no adapter named {name!r}: it has {has}.")
        return list(names) or list(self.adapters)

    def _adapted(self, variables: Variables) -> "list[tuple[Path, LinenLayer, list[str]]]":
        """The layers that have adapters, with the names of these."""
        if not self._layers:
            raise RuntimeError(
                "the layers of the module are not known yet: call adapted.trace(*inputs) first, as "
                "init and attach do."
            )
        there = [name for name in _adapters_in(variables) if name in self.adapters]
        paths = {name: groups.layers_of(*_trees_of(variables, name)) for name in there}
        named = lambda path: [name for name in there if path in paths[name]]
        return [(path, x, named(path)) for path, x in self._layers.items() if named(path)]

    def _matrix(self, variables: Variables, path: Path) -> jax.Array:
        layer = self._layers[path]
        return to_matrix(_weight(variables, path, layer), layer.spec.axes)

    def _check_weight(self, path: Path, use: str) -> None:
        """Raises TypeError if the layer may multiply by another weight than its parameter."""
        if cls := self._layers[path].other_weights:
            raise other_weights_error("/".join(path), use, cls)

    def _folding(self, variables: Variables, path: Path, names: Sequence[str]) -> Folding:
        """These adapters of one layer, switched off or not."""
        self._check_weight(path, "merging, unmerging and detaching change")
        matrix, label = self._matrix(variables, path), "/".join(path)
        *batch, d_in, d_out = matrix.shape
        methods, own, shared = [], [], []
        for name in names:
            trees, method = _trees_of(variables, name), self._method(path, name)
            methods.append(method)
            own.append(groups.layers_of(*trees).get(path, {}))
            of_groups = groups.shared_of(*trees)
            shared.append(groups.with_shared(method[0], {}, of_groups, label, matrix.shape))
        stack, arrays = matrix.reshape(-1, d_in, d_out), (tuple(own), tuple(shared))
        return Folding(label, tuple(names), tuple(methods), stack, tuple(batch), *arrays)

    def _method(self, path: Path, name: str) -> tuple[Adapter, float]:
        """The method of one layer, and its strength, switched off or not."""
        attached = self.adapters[name]
        return attached.at(path), 1.0 if attached.strength is None else attached.strength

    # Functions of their own: a layer's matrix is not held while the next is folded.

    def _fold(
        self, variables: Variables, path: Path, names: Sequence[str]
    ) -> tuple[jax.Array, MergedLayer, dict[str, jax.Array]]:
        folding = self._folding(variables, path, names)
        return *folding.folded(), folding.checksums()

    def _unfold(
        self, variables: Variables, path: Path, before: Mapping[str, jax.Array]
    ) -> jax.Array:
        folding = self._folding(variables, path, list(before))
        folding.check_unchanged(before)
        return folding.unfolded()


# Finding the layers of a model, by watching one abstract call of it: Linen's layers exist only
# while the model runs.


class LinenLayer(NamedTuple):
    """A layer that an adapter can be attached to.

    Attributes:
      scope: Where its parameters are in the collection ``params``.
      spec: Its weight's name, axes and kind.
      shape: The weight's shape in one layer.
      module: The layer, unbound.
      other_weights: Name of the class that may compute another weight than the parameter: its own,
        or that of a module around it; empty if there is no such class.
    """

    scope: Path
    spec: LayerSpec
    shape: tuple[int, ...]
    module: nn.Module
    other_weights: str = ""


Layers: TypeAlias = dict[Path, LinenLayer]


def _find_layers(
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


# Running a model with the arrays of its adapters beside its weights. They travel inside the
# collection ``params``, each layer's in the scope of its weight, so that whatever the model does
# with its parameters happens to them too: a scan or vmap over layers cuts both into layers, nn.jit
# and nn.remat pass both.


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


def _drops(attached: Attached) -> bool:
    return attached.strength is not None and getattr(attached.method, "dropout", 0) > 0


def _beside_weights(
    adapters: Mapping[str, Attached], layers: Layers, variables: Variables, key: Any
) -> tuple[dict[Path, _Beside], Shared]:
    """What a call needs of each adapted layer, by path, and the arrays that layers share."""
    there = _adapters_in(variables)
    missing = [n for n, a in adapters.items() if n not in there and a.strength is not None]
    if missing:
        raise ValueError(
            f"the variables have no arrays of the adapter {missing[0]!r}: make them by `init` or "
            "`attach`, or call `deactivate` first, or the module itself."
        )
    arrays: dict[Path, dict[str, dict[str, jax.Array]]] = {}
    shared: dict[str, dict[str, Arrays]] = {}
    for name in (n for n in adapters if there.get(n) is False):
        trees = _trees_of(variables, name)
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
            if key is not None and _drops(attached) and path in layers:
                own = jax.random.fold_in(key, zlib.crc32(f"{name}:{layer}".encode()))
                stack = layers[path].spec.stack(_weight(variables, path, layers[path]).shape)
                keys[name] = jax.random.split(own, stack) if stack else own
        beside[path] = _Beside(by_name, keys, tuple(plans))
    return beside, shared


def _put_beside(params: Any, layers: Mapping[Path, _Beside]) -> dict[str, Any]:
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


def _interceptor(shared: Shared) -> Callable[..., Any]:
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
        bias = nn.meta.unbox(module.get_variable("params", "bias"))
        if bias is not None:
            bias = bias.reshape(*matrix.shape[:-2], 1, -1) if matrix.ndim > 2 else bias.reshape(-1)
        view = view_call(module, spec.kind, weight, args, kwargs, y)
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


# The variables of an adapted model: which arrays are where, and reading and setting weights.


def _adapters_in(variables: Variables) -> dict[str, bool]:
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


def _trees_of(variables: Variables, name: str) -> tuple[Any, Any]:
    """The trees of an adapter, merged or not: trained, constant; empty where there is none."""
    merged = variables.get(MERGED, {}).get(name)
    if merged is not None:
        return merged.get(TRAINED, {}), merged.get(CONSTANTS, {})
    return variables.get(TRAINED, {}).get(name, {}), variables.get(CONSTANTS, {}).get(name, {})


def _with_arrays(
    variables: Variables, name: str, trees: tuple[Any, Any], checksums: Any = None
) -> dict[str, Any]:
    """The variables with the arrays of one adapter; with checksums, of one that is merged."""
    new = _without_arrays(variables, [name])
    by_collection = dict(zip((TRAINED, CONSTANTS), trees, strict=True))
    if checksums is not None:
        merged = {c: t for c, t in (by_collection | {_CHECKSUMS: checksums}).items() if t}
        return new | {MERGED: {**new.get(MERGED, {}), name: merged}}
    for collection, tree in by_collection.items():
        if tree:
            new[collection] = {**new.get(collection, {}), name: tree}
    return new


def _without_arrays(variables: Variables, names: Iterable[str]) -> dict[str, Any]:
    """The variables without those of these adapters, nor a collection that they leave empty."""
    new, gone = dict(variables), set(names)
    for collection in (TRAINED, CONSTANTS, MERGED):
        others = {k: v for k, v in new.pop(collection, {}).items() if k not in gone}
        if others:
            new[collection] = others
    return new


def _weight(variables: Variables, path: Path, layer: LinenLayer) -> jax.Array:
    """A layer's weight in ``params``.

    Raises:
      ValueError: If there is no such weight, or its stack axes do not lead.
    """
    if "params" not in variables:
        known = ", ".join(map(repr, variables)) or "nothing"
        raise ValueError(
            f"variables has no collection 'params': it has {known}. Pass {{'params': params}}, "
            "as module.init returns it."
        )
    node = variables["params"]
    try:
        for name in (*layer.scope, layer.spec.weight):
            node = node[name]
    except KeyError:
        raise ValueError(
            f"the layer {'/'.join(path)} has no {layer.spec.weight!r} in the variables: they are "
            "those of another model."
        ) from None
    weight = nn.meta.unbox(node)
    if weight.shape != layer.spec.stack(weight.shape) + layer.shape:
        raise ValueError(
            f"the weight of {'/'.join(path)} has shape {weight.shape} in params, {layer.shape} in "
            "its layer: layers must be stacked along the first axis."
        )
    return weight


def _with_matrices(
    variables: Variables, matrices: Sequence[tuple[LinenLayer, jax.Array]]
) -> dict[str, Any]:
    """The variables with other weights, given as matrices ``[..., d_in, d_out]``."""
    if not matrices:
        return dict(variables)
    params = unfreeze(variables["params"])
    for layer, matrix in matrices:
        node = params
        for name in layer.scope:
            node = node[name]
        boxed = node[layer.spec.weight]
        old = nn.meta.unbox(boxed)
        new = from_matrix(matrix, layer.spec.axes, param=old).astype(old.dtype)
        is_box = isinstance(boxed, nn.meta.AxisMetadata)
        node[layer.spec.weight] = boxed.replace_boxed(new) if is_box else new
    return {**variables, "params": params}
