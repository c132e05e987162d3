"""Adapters on a Flax Linen model: a facade around a module that stays as it is.

Arrays of adapters lie in collections of their own, ``adapters`` and ``adapter_constants``, so the
model's parameters keep their paths, and gradients are taken of ``variables["adapters"]`` alone.
"""

from collections.abc import Mapping, Sequence
import copy
import functools
from typing import Any
import zlib

from flax import linen as nn
import jax

from lowrank_optax.adapters import (
    groups,
    linen_calls,
    linen_merging,
    linen_sites,
    linen_variables,
)
from lowrank_optax.adapters.base import Adapter
from lowrank_optax.adapters.folding import MergeReport
from lowrank_optax.adapters.linen_attaching import (
    Attached,
    attach,
    beside_weights,
    wants_keys,
)
from lowrank_optax.adapters.linen_variables import TRAINED
from lowrank_optax.adapters.summaries import AdapterSummary
from lowrank_optax.matrices.selection import Where

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
        self._sites: linen_sites.Sites = {}
        if isinstance(module, Adapted):
            self.module, self.adapters, self._sites = module.module, module.adapters, module._sites
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
          args: Of the model.
          kwargs: Likewise, with ``method``.
        """
        variables = self.module.init(rngs, *args, **kwargs)
        self.trace(*args, rngs=rngs, **kwargs)
        if isinstance(rngs, Mapping) and TRAINED in rngs:
            return attach(self.adapters, self._sites, variables, rngs[TRAINED])
        key = rngs["params"] if isinstance(rngs, Mapping) else rngs
        key = jax.random.fold_in(key, zlib.crc32(TRAINED.encode()))
        return attach(self.adapters, self._sites, variables, key)

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
          variables: Of the module, for example pretrained ones: they stay as they are, except where
            a method changes weights (PiSSA).
          key: Of ``jax.random``.
          args: Of the model: arrays or ``jax.ShapeDtypeStruct``; nothing is computed. Not needed if
            `init` or `trace` has been called.
          kwargs: Likewise; with ``method`` and ``rngs`` as for ``module.init``.

        Raises:
          ValueError: If ``where`` matches no layer (the message lists near ones), a pattern matches
            none of the layers chosen, or the variables are not those of this module.
        """
        if args or kwargs or not self._sites:
            self.trace(*args, **kwargs)
        return attach(self.adapters, self._sites, variables, key)

    def trace(self, *args: Any, rngs: Any = None, **kwargs: Any) -> None:
        """Finds the layers in one abstract call, as `init` and `attach` do.

        Args:
          args: Of the model: arrays or ``jax.ShapeDtypeStruct``.
          rngs: As for ``module.init``, if it needs more than one key.
          kwargs: Of the model, with ``method``.
        """
        rngs = jax.random.key(0) if rngs is None else rngs
        run = functools.partial(self.module.init, rngs)
        self._sites = linen_sites.sites_of(run, args, kwargs)

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
          variables: Of `init` or `attach`.
          args: Of the model.
          rngs: As for ``module.apply``; with ``dropout``, adapters drop some of their inputs.
          mutable: As for ``module.apply``.
          kwargs: Of the model, with ``method`` and ``capture_intermediates``.

        Returns:
          What ``module.apply`` returns.

        Raises:
          ValueError: If there are arrays for a layer that is not in ``params``, no arrays of an
            active adapter, or arrays of one that is merged into ``params`` already.
        """
        own = linen_variables.own_variables(variables)
        if wants_keys(self.adapters, rngs) and not self._sites:
            run = functools.partial(self.module.apply, own, rngs=rngs, mutable=True)
            self._sites = linen_sites.sites_of(run, args, kwargs)
        beside, shared = beside_weights(self.adapters, self._sites, variables, rngs)
        if beside:
            own["params"] = linen_calls.put_beside(own["params"], beside)
        with nn.intercept_methods(linen_calls.interceptor(shared)):
            result = self.module.apply(own, *args, rngs=rngs, mutable=mutable, **kwargs)
        if mutable is False:
            return result
        output, updates = result
        return output, linen_calls.take_away(updates)

    def activate(self, *names: str, strengths: Mapping[str, float] | None = None) -> "Adapted":
        """The same model with these adapters active and no others; see `lro.adapters.activate`.

        Args:
          names: Of the adapters; none for all.
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
          variables: Of `init` or `attach`.
          name: Of the adapter; None for all that are active.

        Raises:
          ValueError: If there is nothing to merge, or a change that depends on the weight (DoRA's)
            would have to be merged together with others or at a strength other than 1.
          RuntimeError: If the layers are not known yet: see `trace`.
        """
        wanted = self._check_names([name] if name else [])
        return linen_merging.merge(self.adapters, self._known(), variables, wanted)

    def unmerge(self, variables: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
        """The variables with merged adapters taken out of ``params``, to the rounding of its dtype.

        Args:
          variables: Of `merge`.
          name: Of the adapter; None for all that are merged.

        Raises:
          ValueError: If none is merged, or one's arrays or strength have changed since `merge`.
          RuntimeError: If the layers are not known yet: see `trace`.
        """
        wanted = self._check_names([name] if name else [])
        return linen_merging.unmerge(self.adapters, self._known(), variables, wanted)

    def detach(self, variables: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
        """The variables without those of the adapters: with ``name=None``, the module's own.

        What is merged stays in the weights. Where a method changed them when it was attached
        (PiSSA), the original ones come back, to the rounding of their dtype, unless it is merged.

        Args:
          variables: Of `init`, `attach` or `merge`.
          name: Of the adapter; None for all.
        """
        wanted = self._check_names([name] if name else [])
        changes = any(self.adapters[n].method.changes_base for n in wanted)
        sites = self._known() if changes else {}
        return linen_merging.detach(self.adapters, sites, variables, wanted)

    def summary(self, variables: Mapping[str, Any]) -> AdapterSummary:
        """What is attached where, with counts and bytes: see `lro.adapters.summary`.

        Args:
          variables: Of `init` or `attach`, or their shapes.
        """
        return linen_merging.summary(self.adapters, self._known(), variables)

    def _with(self, adapters: dict[str, Attached]) -> "Adapted":
        new = copy.copy(self)
        new.adapters = adapters
        return new

    def _check_names(self, names: Sequence[str]) -> list[str]:
        for name in names:
            if name not in self.adapters:
                raise ValueError(f"there is no adapter {name!r}, but {list(self.adapters)}.")
        return list(names) or list(self.adapters)

    def _known(self) -> linen_sites.Sites:
        if not self._sites:
            raise RuntimeError(
                "the layers of the module are not known yet: call adapted.trace(*inputs) first, as "
                "init and attach do."
            )
        return self._sites
