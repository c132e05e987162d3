"""Adapters in Flax NNX: an adapted layer is the same object, of a subclass of its class.

So paths, names and types of the model's own weights stay as they are while adapters are attached,
code that reads ``layer.kernel`` goes on working, and `detach` has only to take its own parts away.

Arrays that layers share belong to the model `attach` was given, as ``model.adapter_groups``: in a
layer of a stack run by a scan they would be cut along the layers. Its layers find them while
the model's methods run.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from flax import nnx
import jax

from lowrank_optax.adapters import sites
from lowrank_optax.adapters.base import Adapter
from lowrank_optax.adapters.derivatives import refuse_derivative, warn_of_derivative
from lowrank_optax.adapters.outputs import Part, adapted_output
from lowrank_optax.adapters.selection import chosen
from lowrank_optax.adapters.sharing import shared_arrays
from lowrank_optax.matrices.flax_layers import Kernel, place
from lowrank_optax.matrices.selection import Where
from lowrank_optax.matrices.views import WeightDimensionNumbers, to_matrix


class AdapterParam(nnx.LoRAParam):
    """A trained array of an adapter."""


class AdapterConstant(nnx.Variable):
    """An array of an adapter that is not trained."""


class AlsoTrained(nnx.Param):
    """A parameter of the model that is trained beside the adapters."""

    type_before: ClassVar[type] = nnx.Param


trainable = nnx.Any(AdapterParam, AlsoTrained)
"""The filter of what is trained: ``nnx.Optimizer(model, tx, wrt=trainable)``."""


class LayerAdapter(nnx.Module):
    """One adapter in one layer.

    Attributes:
      method: What it is.
      arrays: Its arrays by name, stacked as the layer is; without those it shares. While it is
        merged they are at ``merged_arrays`` instead, so a state says whether the weights in it
        hold the change, and one of a merged model fits no model that is not merged.
      merge_checksum: While it is merged: what its arrays were, see `folding.checksum`.
      group: Name of the arrays it shares in ``model.adapter_groups``; None if it shares none.
      active: Whether calls apply it.
      strength: What its change is multiplied by.
      deterministic: Whether nothing is dropped, as after ``model.eval()``.
      shared: Marks of the shared arrays while the model's methods run; a part of the module's
        static structure, so that a function of the layer that was compiled for others is not taken
        for the same.
    """

    def __init__(
        self,
        method: Adapter,
        name: str,
        group: str | None,
        arrays: Mapping[str, nnx.Variable],
        dropout: nnx.RngStream | None,
    ) -> None:
        self.method, self.name, self.group = method, name, group
        self.arrays = nnx.Dict(arrays)
        self.dropout = nnx.data(dropout)
        self.active, self.strength = True, 1.0
        self.deterministic = False
        self.shared: tuple[Any, ...] | None = None

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
        """Of ``nnx.view``.

        Args:
          deterministic: Whether nothing is dropped.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def p(self) -> dict[str, jax.Array]:
        """All its arrays, shared ones too."""
        if self.group is not None and shared_arrays(self.name, self.group) is None:
            raise RuntimeError(
                f"the adapter {self.name!r} shares arrays that belong to the model that `attach` "
                "was given: call a method of that model, not of a part of it."
            )
        return self.known()

    def known(self) -> dict[str, jax.Array]:
        """Its own arrays, and shared ones while the model's methods run."""
        own = {name: variable[...] for name, variable in self.variables().items()}
        shared = None if self.group is None else shared_arrays(self.name, self.group)
        return own | dict(shared or {})

    def key(self) -> jax.Array | None:
        """A key for dropout, if there is any."""
        return None if self.dropout is None or self.deterministic else self.dropout()


def apply_adapters(
    layer: Any, y: jax.Array, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> jax.Array:
    """The output of a layer with its active adapters."""
    # Of a layer inside its scan, so there are no stack axes; batch axes are experts.
    kernel, spec = weight(layer)
    call = sites.view_call(layer, kernel, args, kwargs, y)
    matrix = to_matrix(kernel, spec)
    parts = [
        Part(a.method, a.p(), a.strength, a.key()) if a.active else Part(a.method, a.p(), None)
        for a in layer.adapters.values()
        if not a.merged
    ]
    bias = _bias(layer, matrix.shape)
    out = adapted_output(parts, call.x, call.rows(y), weight=matrix, bias=bias)
    return _watched(layer, call.unrows(out).astype(y.dtype), kernel)


def _watched(layer: Any, y: jax.Array, kernel: jax.Array) -> jax.Array:
    """The layer's output; derivatives by merged arrays are refused, by its weight warned of."""
    for adapter in layer.adapters.values():
        if adapter.merged:
            y = refuse_derivative(MERGED_ARRAYS.format(repr(adapter.name)), y, adapter.known())
    if not isinstance(weight_variable(layer), AlsoTrained):
        y = warn_of_derivative(FROZEN_WEIGHT, y, kernel)
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


def _bias(layer: Any, matrix_shape: tuple[int, ...]) -> jax.Array | None:
    """A layer's bias ``[d_out]``; of experts ``[*batch, 1, d_out]``, beside their rows."""
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, nnx.Variable):
        return None
    *batch, _, d_out = matrix_shape
    return bias[...].reshape(*batch, 1, d_out) if batch else bias[...].reshape(d_out)


def weight(layer: Any) -> tuple[jax.Array, WeightDimensionNumbers]:
    """A layer's weight, with its stack axes if it has them, and which axes make its matrix."""
    return weight_variable(layer)[...], placed(layer)[0]


def weight_variable(layer: Any) -> Any:
    """The variable of a layer's weight."""
    return getattr(layer, _kernel(layer).path[0])


def placed(layer: Any, path: str = "a layer") -> tuple[WeightDimensionNumbers, tuple[int, ...]]:
    """Which axes make the matrix of a layer's weight, and the sizes of those it is stacked along.

    Raises:
      ValueError: If that cannot be told, or it is stacked along another axis than the first.
    """
    kernel, shape = _kernel(layer), weight_variable(layer).shape
    bias = getattr(layer, "bias", None)
    found = place(kernel, shape, bias.shape if isinstance(bias, nnx.Variable) else None)
    if found is None or len(shape) != len(found[1]) + len(kernel.shape):
        raise ValueError(
            f"the weight of {path} has shape {shape}, of which a {type(layer).__name__} of its own "
            f"has {kernel.shape}: stack layers along their first axis."
        )
    return found


def _kernel(layer: Any) -> Kernel:
    kernel = sites.weight_of(layer)
    if kernel is None:
        raise TypeError(f"{type(layer).__name__} is no layer that adapters can be attached to.")
    return kernel


def set_weight(layer: Any, value: jax.Array) -> None:
    """Changes the values of a layer's weight; its shape, dtype and sharding stay."""
    variable = weight_variable(layer)
    variable.set_value(value.reshape(variable.shape).astype(variable.dtype))


def adaptable_layers(model: nnx.Module) -> dict[tuple[str, ...], nnx.Module]:
    """The layers of a model that adapters can be attached to, by path; shared ones once."""
    return {
        tuple(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if sites.weight_of(module) is not None
    }


def chosen_layers(model: nnx.Module, where: Where) -> dict[tuple[str, ...], Any]:
    """Those of them that ``where`` means, as for `attach`; raises what `chosen` raises."""
    layers = adaptable_layers(model)
    default = {path for path, layer in layers.items() if _kernel(layer).by_default}
    return {path: layers[path] for path in chosen(layers, default, where)}


def adapted_layers(model: nnx.Module) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The layers of a model that have adapters, with their paths."""
    for path, layer in adaptable_layers(model).items():
        if getattr(layer, "adapters", None):
            yield path, layer


def adapter_names(model: Any) -> list[str]:
    """The names of the adapters that a model has, in the order of their layers."""
    return list(
        dict.fromkeys(name for _, layer in adapted_layers(model) for name in layer.adapters)
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
