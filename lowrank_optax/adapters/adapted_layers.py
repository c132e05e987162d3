"""Adapters in Flax NNX: an adapted layer is the same object, whose calls are wrapped.

So paths, names and types of the model's own weights stay as they are while adapters are attached,
code that reads ``layer.kernel`` goes on working, and `detach` has only to remove its own parts.

Arrays that layers share belong to the model `attach` was given, as ``model.adapter_groups``.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
from typing import Any, ClassVar

from flax import nnx
import jax

from lowrank_optax.adapters.base import Adapter
from lowrank_optax.adapters.folding import check_call, other_weights_error
from lowrank_optax.adapters.groups import KIND
from lowrank_optax.adapters.layer_calls import (
    Part,
    adapted_output,
    on_derivative,
    refuse,
    view_call,
    warn,
)
from lowrank_optax.adapters.tied_tables import check_can_attend
from lowrank_optax.matrices.selection import Path, Where, path_string
from lowrank_optax.matrices.views import from_matrix, matrix_shape, to_matrix
from lowrank_optax.modules.select import modules_by_path, select
from lowrank_optax.modules.shared import SharingModule, is_sharing, share, shared_arrays
from lowrank_optax.modules.spec import LayerSpec, has_other_weights, layer_spec, usable_weight
from lowrank_optax.modules.wrap import around_of, own_class, wrap, wrapped

_LAYER, _OWNER = "adapters", "adapters_shared"
"""Names of the wraps of adapted layers, and of a model that has arrays for its layers to share."""


class AdapterParam(nnx.LoRAParam):
    """A trained array of an adapter."""


class AdapterConstant(nnx.Variable):
    """An array of an adapter that is not trained."""


class AlsoTrained(nnx.Param):
    """A parameter of the model that is trained beside the adapters."""

    type_before: ClassVar[type] = nnx.Param


trainable = nnx.Any(AdapterParam, AlsoTrained)
"""The filter of what is trained: ``nnx.Optimizer(model, tx, wrt=trainable)``."""


class LayerAdapter(SharingModule):
    """One adapter in one layer.

    Attributes:
      method: What it is.
      arrays: Its arrays by name, stacked as the layer is; without those it shares. While it is
        merged they are at ``merged_arrays`` instead, so a state says whether the weights in it
        hold the change, and one of a merged model fits no model that is not merged.
      merge_checksum: While it is merged: what its arrays were, see `folding.checksum`.
      group: Name of the arrays it shares in ``model.adapter_groups``; None if it shares none.
      active: Whether calls apply it. Like ``strength``, a part of the graph definition: compiled
        functions of the model are compiled again when it changes.
      strength: Factor of its change.
      deterministic: Whether nothing is dropped, as after ``model.eval()``.
    """

    def __init__(
        self,
        method: Adapter,
        name: str,
        group: str | None,
        arrays: Mapping[str, nnx.Variable],
        dropout: nnx.RngStream | None,
    ) -> None:
        super().__init__()
        self.method, self.name, self.group = method, name, group
        self.arrays = nnx.Dict(arrays)
        self.dropout = nnx.data(dropout)
        self.active, self.strength = True, 1.0
        self.deterministic = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses what ``nnx.update`` would add from a state with the arrays elsewhere."""
        if name in ("arrays", "merged_arrays") and isinstance(value, nnx.State):
            theirs, ours = "merged", "not merged"
            if self.merged:
                theirs, ours = ours, theirs
            raise ValueError(
                f"in this state the adapter {self.name!r} is {theirs}, in the model it is {ours}: "
                f"`{'unmerge' if self.merged else 'merge'}` the model before it is updated."
            )
        super().__setattr__(name, value)

    @property
    def merged(self) -> bool:
        """Whether it is folded into the weight."""
        return "merged_arrays" in vars(self)

    def set_merged(self, checksum: jax.Array) -> None:
        """Notes that it has been folded into the weight."""
        self.merged_arrays, self.merge_checksum = self.arrays, AdapterConstant(checksum)
        del self.arrays
        self.active = False

    def set_unmerged(self) -> None:
        """Notes that it has been taken out of the weight again."""
        self.arrays = self.merged_arrays
        del self.merged_arrays, self.merge_checksum
        self.active = True

    def variables(self) -> nnx.Dict:
        """Its own arrays, merged or not."""
        return self.merged_arrays if self.merged else self.arrays

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets what ``nnx.view`` is given.

        Args:
          deterministic: Whether nothing is dropped.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def p(self) -> dict[str, jax.Array]:
        """All its arrays, shared ones too."""
        key = self.shared_key()
        if key is not None and shared_arrays(key) is None:
            raise RuntimeError(
                f"the adapter {self.name!r} shares arrays that belong to the model that `attach` "
                "was given: call a method of that model, not of a part of it."
            )
        return self.known()

    def known(self) -> dict[str, jax.Array]:
        """Its own arrays, and shared ones while the model's methods run."""
        own = {name: variable[...] for name, variable in self.variables().items()}
        key = self.shared_key()
        return own | dict((key and shared_arrays(key)) or {})

    def shared_key(self) -> tuple[str, str] | None:
        """The key of its group's arrays in `share`."""
        return None if self.group is None else (self.name, self.group)

    def key(self) -> jax.Array | None:
        """A key for dropout, if there is any."""
        return None if self.dropout is None or self.deterministic else self.dropout()


@dataclasses.dataclass(frozen=True)
class _AdaptedCall:
    """What wraps the calls of an adapted layer."""

    spec: LayerSpec

    def __call__(self, call: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
        if call.__name__ == "attend":
            check_can_attend(layer)
            return call(*args, **kwargs)
        check_call(layer, [a.method for a in layer.adapters.values() if a.active])
        y = call(*args, **kwargs)
        # Inside a scan over layers there are no stack axes; batch axes are experts.
        kernel = weight_variable(layer)[...]
        view = view_call(layer, self.spec.kind, kernel, args, kwargs, y)
        matrix = to_matrix(kernel, self.spec.axes)
        parts = [
            Part(a.method, a.p(), a.strength if a.active else None, a.key() if a.active else None)
            for a in layer.adapters.values()
            if not a.merged
        ]
        bias = getattr(layer, "bias", None)
        bias = view.bias(bias[...]) if isinstance(bias, nnx.Variable) else None
        out = adapted_output(parts, view.x, view.rows(y), weight=matrix, bias=bias)
        return _watched(layer, view.unrows(out).astype(y.dtype), kernel)


def _with_shared_arrays(call: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """What wraps the methods of a model that has arrays for its layers to share."""
    with sharing(model):
        return call(*args, **kwargs)


@contextlib.contextmanager
def sharing(model: Any) -> Iterator[None]:
    """While open, the layers of this model find the arrays that they share."""
    if is_sharing(model) or not hasattr(model, "adapter_groups"):
        yield
        return
    arrays: dict[Hashable, dict[str, jax.Array]] = {
        (name, group): {k: v[...] for k, v in arrays.items()}
        for name, groups in model.adapter_groups.items()
        for group, arrays in groups.items()
    }
    with share(model, arrays):
        yield


def set_wraps(module: Any) -> None:
    """Wraps a module as its adapters and shared arrays, or their absence, ask for."""
    adapted = _AdaptedCall(spec_of(module)) if hasattr(module, "adapters") else None
    methods = ("__call__", "attend") if isinstance(module, nnx.Embed) else ("__call__",)
    wrap(module, _LAYER, adapted, methods)
    shares = _with_shared_arrays if hasattr(module, "adapter_groups") else None
    wrap(module, _OWNER, shares, _public_methods(own_class(module)))


def remove_adapter(layer: Any, name: str) -> None:
    """Takes an adapter away from a layer, which is as it was where it has no other."""
    del layer.adapters[name]
    if not layer.adapters:
        del layer.adapters
    set_wraps(layer)


def _public_methods(cls: type) -> list[str]:
    """The public methods of a model's class, and ``__call__``; without those of every module."""
    names = (
        name
        for base in cls.__mro__
        if base not in nnx.Module.__mro__
        for name, x in vars(base).items()
        if callable(x)
        and not isinstance(x, type | staticmethod | classmethod)
        and (name == "__call__" or not name.startswith("_"))
    )
    return list(dict.fromkeys(names))


def _watched(layer: Any, y: jax.Array, kernel: jax.Array) -> jax.Array:
    """The layer's output; derivatives by merged arrays are refused, by its weight warned of."""
    for adapter in layer.adapters.values():
        if adapter.merged:
            y = on_derivative(refuse, MERGED_ARRAYS.format(repr(adapter.name)), y, adapter.known())
    if not isinstance(weight_variable(layer), AlsoTrained):
        y = on_derivative(warn, FROZEN_WEIGHT, y, kernel)
    return y


MERGED_ARRAYS = (
    "a gradient by arrays of the adapter {0} is asked for, but it is merged into the weights: it "
    "would be zero. Call `unmerge` before you train it, `detach` it to train the weights, or take "
    "gradients without it: nnx.All(lro.adapters.trainable, nnx.Not(nnx.PathContains({0})))."
)

FROZEN_WEIGHT = (
    "a gradient by the frozen weight of a layer with adapters is asked for, as wrt=nnx.Param does: "
    "use wrt=lro.adapters.trainable and nnx.DiffState(0, lro.adapters.trainable). Weights that are "
    "to be trained too are named by lro.adapters.also_train."
)


def spec_of(layer: Any, path: str = "a layer") -> LayerSpec:
    """What is known of a layer: kept where it is adapted, else `layer_spec`."""
    around = around_of(layer, _LAYER)
    return around.spec if isinstance(around, _AdaptedCall) else layer_spec(layer, path)


def weight_variable(layer: Any) -> Any:
    """The variable of a layer's weight."""
    return getattr(layer, spec_of(layer).weight)


def weight_matrix(layer: Any) -> jax.Array:
    """A layer's weight as ``[*stack, *batch, d_in, d_out]``; raises what `check_weights` does."""
    check_weights(layer, {("a layer",): layer}, "this reads")
    return to_matrix(weight_variable(layer)[...], spec_of(layer).axes)


def set_weight_matrix(layer: Any, matrix: jax.Array) -> None:
    """Changes the values of a layer's weight, given as `weight_matrix` returns it."""
    variable = weight_variable(layer)
    value = from_matrix(matrix.reshape(weight_shape(layer)), spec_of(layer).axes, variable[...])
    variable.set_value(value.astype(variable.dtype))


def weight_shape(layer: Any) -> tuple[int, ...]:
    """The shape of `weight_matrix`."""
    return matrix_shape(weight_variable(layer).shape, spec_of(layer).axes)


def chosen_layers(model: nnx.Module, where: Where) -> dict[tuple[str, ...], Any]:
    """The layers that ``where`` means, as for `attach`, by path; raises what `select` raises."""
    layers = modules_by_path(model, lambda module: usable_weight(module) is not None)
    weights = {path: usable_weight(layer) for path, layer in layers.items()}
    default = [path for path, weight in weights.items() if weight and weight.by_default]
    return select(layers, where, KIND, default=default)


def check_weights(model: nnx.Module, layers: Mapping[Path, Any], use: str) -> None:
    """Raises TypeError if one of these layers multiplies by another weight than its parameter.

    Args:
      model: The model, whose modules may compute the weights of those inside them.
      layers: The layers by path.
      use: What the weight is needed for, see `other_weights_error`.
    """
    for module in modules_by_path(model, has_other_weights).values():
        inside = {id(x) for x in modules_by_path(module, lambda _: True).values()}
        for path, layer in layers.items():
            if id(layer) in inside:
                raise other_weights_error(path_string(path), use, own_class(module).__name__)


def adapted_layers(model: nnx.Module) -> dict[tuple[str, ...], Any]:
    """The layers of a model that have adapters, by path."""
    return wrapped(model, _LAYER)


def adapter_names(model: Any) -> list[str]:
    """The names of the adapters that a model has, in the order of their layers."""
    return list(
        dict.fromkeys(name for layer in adapted_layers(model).values() for name in layer.adapters)
    )


def check_names(model: Any, names: Iterable[str]) -> list[str]:
    """These names, or all of the model's if there are none.

    Raises:
      ValueError: If the model has no adapter of one of these names, or no adapter at all.
    """
    known, names = adapter_names(model), list(names)
    missing = [name for name in names if name not in known]
    if missing or not known:
        if not known:
            raise ValueError(
                f"the {type(model).__name__} has no adapter: lro.adapters.attach(model, method, "
                "rngs=...) attaches one."
            )
        has = ", ".join(map(repr, known))
        raise ValueError(f"the model has no adapter named {missing[0]!r}: it has {has}.")
    return names or known
