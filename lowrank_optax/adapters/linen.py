"""Adapters on a Flax Linen model: a facade around a module that stays as it is.

Arrays of adapters are in collections of their own, ``adapters`` and ``adapter_constants``, so the
model's parameters keep their paths, and gradients are taken of ``variables["adapters"]`` alone.
"""

from collections.abc import Mapping, Sequence
import copy
from typing import Any
import zlib

from flax import linen as nn
import jax
import jax.numpy as jnp

from lowrank_optax.adapters import groups
from lowrank_optax.adapters.base import Adapter, counts_of, parameter_count
from lowrank_optax.adapters.folding import MergeReport, check_can_unmerge
from lowrank_optax.adapters.linen_calls import (
    beside_weights,
    drops,
    find_layers,
    interceptor,
    put_beside,
)
from lowrank_optax.adapters.linen_variables import (
    CHECKSUMS,
    CONSTANTS,
    MERGED,
    TRAINED,
    Attached,
    Layers,
    LinenLayer,
    Variables,
    adapters_in,
    fold,
    folding_of,
    matrix_of,
    trees_of,
    unfold,
    with_adapters,
    with_arrays,
    with_matrices,
    without_arrays,
)
from lowrank_optax.adapters.summaries import AdapterSummary, SummaryRow, row_of
from lowrank_optax.matrices.selection import Path, Where
from lowrank_optax.modules.spec import without_beside

__all__ = ["Adapted"]


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
            return with_adapters(variables, rngs[TRAINED], self.adapters, self._layers)
        key = rngs["params"] if isinstance(rngs, Mapping) else rngs
        key = jax.random.fold_in(key, zlib.crc32(TRAINED.encode()))
        return with_adapters(variables, key, self.adapters, self._layers)

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
        return with_adapters(variables, key, self.adapters, self._layers)

    def trace(self, *args: Any, rngs: Any = None, **kwargs: Any) -> None:
        """Finds the layers in one abstract call, as `init` and `attach` do.

        Args:
          args: Positional arguments of the model: arrays or ``jax.ShapeDtypeStruct``.
          rngs: As for ``module.init``, if it needs more than one key.
          kwargs: Keyword arguments of the model, with ``method``.
        """
        rngs = jax.random.key(0) if rngs is None else rngs
        self._layers = find_layers(self.module, None, rngs, args, kwargs)

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
        if key is not None and any(map(drops, self.adapters.values())):
            if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
                key = jax.random.wrap_key_data(key)
            if not self._layers:
                self._layers = find_layers(self.module, own, rngs, args, kwargs)
        beside, shared = beside_weights(self.adapters, self._layers, variables, key)
        if beside:
            own["params"] = put_beside(own["params"], beside)
        with nn.intercept_methods(interceptor(shared)):
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
        names, there = self._check_names([name] if name else []), adapters_in(variables)
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
                methods = self._methods(path, together)
                check_can_unmerge(label, [(n, *method) for n, method in methods.items()])
                weights, row, numbers = fold(variables, path, layer, self._methods(path, now))
                rows.append(row)
                new.append((layer, weights))
                for n, checksum in numbers.items():
                    checksums[n][label] = checksum
        result = with_matrices(variables, new)
        for n in wanted:
            result = with_arrays(result, n, trees_of(variables, n), checksums[n])
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
        names, there = self._check_names([name] if name else []), adapters_in(variables)
        layers, wanted = self._adapted(variables), [n for n in names if there.get(n)]
        if not wanted:
            raise ValueError(f"nothing to unmerge: none of {names} is merged.")
        new = []
        for path, layer, of_layer in layers:
            now = [n for n in of_layer if n in wanted]
            if now:
                merged, label = variables[MERGED], "/".join(path)
                before = {n: merged[n][CHECKSUMS][label] for n in now}
                methods = self._methods(path, now)
                new.append((layer, unfold(variables, path, layer, methods, before)))
        result = with_matrices(variables, new)
        for n in wanted:
            result = with_arrays(result, n, trees_of(variables, n))
        return result

    def detach(self, variables: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
        """The variables without those of the adapters: with ``name=None``, the module's own.

        What is merged stays in the weights. Where a method changed them when it was attached
        (PiSSA), the original ones come back, to the rounding of their dtype, unless it is merged.

        Args:
          variables: What `init`, `attach` or `merge` returned.
          name: Name of the adapter; None for all.
        """
        names, there = self._check_names([name] if name else []), adapters_in(variables)
        result = dict(variables)
        for n in names:
            if self.adapters[n].method.changes_base and there.get(n) is False:
                new = []
                for path, layer, of_layer in self._adapted(result):
                    if n in of_layer:
                        folding = folding_of(result, path, layer, self._methods(path, [n]))
                        new.append((layer, folding.original()))
                result = with_matrices(result, new)
        return without_arrays(result, names)

    def summary(self, variables: Mapping[str, Any]) -> AdapterSummary:
        """What is attached where, with counts and bytes: see `lro.adapters.summary`.

        Args:
          variables: What `init` or `attach` returned, or their shapes.
        """
        rows, there = [], adapters_in(variables)
        trees = {name: trees_of(variables, name) for name in there if name in self.adapters}
        for path, layer, of_layer in self._adapted(variables):
            matrix = lambda v, p=path, x=layer: matrix_of(v, p, x)
            shape = jax.eval_shape(matrix, variables).shape
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
        there = [name for name in adapters_in(variables) if name in self.adapters]
        paths = {name: groups.layers_of(*trees_of(variables, name)) for name in there}
        named = lambda path: [name for name in there if path in paths[name]]
        return [(path, x, named(path)) for path, x in self._layers.items() if named(path)]

    def _methods(self, path: Path, names: Sequence[str]) -> dict[str, tuple[Adapter, float]]:
        """The methods of one layer with their strengths, switched off or not."""
        adapters = ((name, self.adapters[name]) for name in names)
        return {n: (a.at(path), 1.0 if a.strength is None else a.strength) for n, a in adapters}
