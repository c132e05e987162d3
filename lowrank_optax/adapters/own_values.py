"""Training of the model's own parameters beside adapters, and freezing of adapters' arrays.

The values of the active adapter are in the parameter itself, so that whatever reads it computes
with them. Those of the base and of other adapters are stored in ``own_values`` of the parameter's
module.
"""

from collections.abc import Callable, Collection, Iterator
import contextlib
import functools
from typing import Any, NamedTuple, TypeAlias

from flax import nnx
import jax
import jax.numpy as jnp

from lowrank_optax.adapters.adapted_layers import (
    AdapterConstant,
    AdapterParam,
    AlsoTrained,
    LayerAdapter,
    adapted_layers,
    adapter_names,
    check_names,
    weight_variable,
)
from lowrank_optax.compat.flax import set_class
from lowrank_optax.matrices.selection import Path, matching, path_string
from lowrank_optax.modules.wrap import made_by

_SHARDING = ("out_sharding", "sharding_rules", "mesh")


_VALUES_OF = "values_of_"


Arrays: TypeAlias = str | Callable[[tuple[str, ...], Any], bool]


def also_train(model: Any, where: Any, name: str | None = None) -> list[str]:
    """Trains parameters of the model itself beside its adapters (PEFT's ``modules_to_save``).

    Their types change in place to `AlsoTrained`, which ``lro.adapters.trainable`` has; they are
    still ``nnx.Param``. Do this before the optimizer is made.

    The trained values belong to the adapter: where it is not active, and after `detach`, the
    parameters have the base's values and their own types again. So a copy of the base's values is
    kept, beside the ones that are trained.

    Args:
      model: Any NNX model.
      where: Which: a regular expression found in the parameter's path (``norm/scale``), or any
        filter of ``flax.nnx``.
      name: The adapter that the values belong to, which must be active; None for the model's only
        one.

    Returns:
      Paths of what is trained now.

    Raises:
      ValueError: If ``where`` matches no parameter (the message lists near ones); if the model has
        no adapter ``name``, several where that is None, or it is inactive; or if a parameter has
        values of another active adapter in it, an adapter is merged into it, or one was computed
        from it (DoRA, PiSSA).

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.LayerNorm(2, rngs=rngs))
      >>> lro.adapters.also_train(model, "scale|bias$")
      ['layers/0/bias', 'layers/1/bias', 'layers/1/scale']
    """
    params = parameters_of(model)
    paths = matching("where", params, where, "parameter")
    claim(model, {path: params[path] for path in paths}, _owner(model, name))
    return [path_string(path) for path in paths]


def freeze_arrays(model: Any, names: Arrays) -> list[str]:
    """Freezes some arrays of adapters: their types change in place to `AdapterConstant`.

    At the next compilation their gradients and optimizer state are gone, which masked updates do
    not save: the second phase of methods that freeze as they go (AFLoRA, LaMDA). Make a new
    optimizer afterwards.

    Args:
      model: A model with adapters.
      names: Which: a regular expression that is the whole of an array's name (``"B"``, ``"A|B"``)
        or found in its path (``"query/.*/B$"``), or a function of path and variable.

    Returns:
      Paths of what is frozen now.

    Raises:
      ValueError: If ``names`` matches no array (the message lists near ones).

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> _ = lro.adapters.attach(model, lro.adapters.LoRA(rank=1), where=".*", rngs=0)
      >>> lro.adapters.freeze_arrays(model, "A")
      ['adapters/default/arrays/A']
      >>> list(nnx.state(model, lro.adapters.trainable)["adapters"]["default"]["arrays"])
      ['B']
    """
    arrays = _variables(model, nnx.filterlib.to_predicate(AdapterParam))
    if isinstance(names, str) and "/" not in names:
        names = rf"(^|/)({names})$"
    paths = matching("names", arrays, names, "trained array of an adapter")
    for path in paths:
        set_class(arrays[path], AdapterConstant)
    return [path_string(path) for path in paths]


def _owner(model: Any, name: str | None) -> str:
    """The adapter that trained parameters belong to."""
    known = adapter_names(model)
    if name is None and len(known) > 1:
        raise ValueError(
            f"name=None: the model has adapters {', '.join(map(repr, known))}; give the name of "
            "that which the parameters are trained with."
        )
    if name is not None:
        check_names(model, [name])
    if known and (name or known[0]) not in active_names(model):
        raise ValueError(f"the adapter {name or known[0]!r} is inactive: activate it first.")
    # Before there is an adapter, that which `attach` makes unless it is told a name.
    return name or (known[0] if known else "default")


class OwnValues(nnx.Module):
    """The values of one parameter that are not in the parameter itself.

    They are its attributes ``values_of_<adapter>`` (``values_of_`` alone for the base's): which of
    them there are says whose values are in the parameter.

    Attributes:
      parameter: Path of the parameter, for messages.
      live: Whose values are in the parameter itself: an adapter's name, None for the base's.
      constant: The adapters whose values are not trained.
    """

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter
        self.live: str | None = None
        self.constant: tuple[str, ...] = ()

    def __setattr__(self, key: str, value: Any) -> None:
        """Refuses what ``nnx.update`` would add from a state in which others are active."""
        if key.startswith(_VALUES_OF) and isinstance(value, nnx.Variable):
            values = "the base" if self.live is None else f"the adapter {self.live!r}"
            raise ValueError(
                f"{self.parameter} has the values of {values} in the model, and others in this "
                "state. Before the update call lro.adapters.activate(model, ...) with the adapters "
                "that are active in the state, or lro.adapters.deactivate(model) if there is none."
            )
        super().__setattr__(key, value)

    def stored(self) -> dict[str | None, AdapterConstant]:
        """The values that are not in the parameter, by adapter; the base's under None."""
        keys = [key for key in vars(self) if key.startswith(_VALUES_OF)]
        return {key.removeprefix(_VALUES_OF) or None: getattr(self, key) for key in keys}

    def store(self, name: str | None, value: AdapterConstant) -> None:
        """Puts aside the values of an adapter, or of the base."""
        super().__setattr__(f"{_VALUES_OF}{name or ''}", value)

    def drop(self, name: str | None) -> None:
        """Forgets the stored values of an adapter, or of the base."""
        delattr(self, f"{_VALUES_OF}{name or ''}")

    def owners(self) -> set[str]:
        """The adapters that have values of their own."""
        return {name for name in (*self.stored(), self.live) if name is not None}

    def swap(self, variable: Any, name: str | None) -> None:
        """Exchanges the values in the parameter for those of an adapter, or of the base."""
        if name == self.live:
            return
        self.store(self.live, _copy(variable, variable.get_value()))
        variable.set_value(self.stored()[name].get_value())
        self.drop(name)
        self.live = name
        self.set_type(variable)

    def set_type(self, variable: Any) -> None:
        """The parameter is trained while trained values are in it."""
        if self.live is None or self.live in self.constant:
            set_class(variable, getattr(type(variable), "type_before", type(variable)))
        else:
            set_class(variable, _also_trained(type(variable)))


class OwnedParameter(NamedTuple):
    """A parameter with values of adapters.

    Attributes:
      path: Path of the parameter.
      variable: The parameter.
      module: The module that has ``own_values``.
      key: Key of the parameter in ``own_values``.
    """

    path: Path
    variable: Any
    module: Any
    key: str

    @property
    def values(self) -> OwnValues:
        return self.module.own_values[self.key]


def claim(model: Any, variables: dict[Path, Any], name: str, *, trained: bool = True) -> None:
    """Gives an adapter its own values for parameters: copies of those there, which become live.

    Args:
      model: The model.
      variables: The parameters by path.
      name: The adapter.
      trained: Whether they are trained.

    Raises:
      ValueError: If the values of another adapter stand in one, an adapter is merged into it, or
        the method of an adapter has read it. That of this adapter may have, of values that are
        not trained: it was given those.
    """
    check_can_claim(model, variables, "" if trained else name)
    places = _places(model)
    owned = [OwnedParameter(path, x, *places[path]) for path, x in variables.items()]
    for one in owned:
        live = one.values.live if one.key in getattr(one.module, "own_values", {}) else None
        if live not in (None, name):
            raise ValueError(
                f"{path_string(one.path)} has values of the adapter {live!r} in it: deactivate "
                f"that before {name!r} gets its own."
            )
    for path, variable, module, key in owned:
        if not hasattr(module, "own_values"):
            module.own_values = nnx.Dict()
        if key not in module.own_values:
            module.own_values[key] = OwnValues(path_string(path))
        values = module.own_values[key]
        if name not in values.owners():
            # A copy: a step may donate the parameter.
            values.store(name, _copy(variable, jax.tree.map(_copied, variable.get_value())))
        values.swap(variable, name)
        if trained:
            values.constant = tuple(n for n in values.constant if n != name)
        elif name not in values.constant:
            values.constant = (*values.constant, name)
        values.set_type(variable)


def live_in(model: Any, paths: Collection[Path]) -> dict[str, list[str]]:
    """Adapters whose values are in these parameters, with the parameters' paths."""
    found: dict[str, list[str]] = {}
    for one in owned_parameters(model):
        if one.path in paths and one.values.live is not None:
            found.setdefault(one.values.live, []).append(path_string(one.path))
    return found


def check_can_claim(model: Any, paths: Collection[Path], owner: str = "") -> None:
    """Raises ValueError where an adapter is merged into a parameter, or its method has read it.

    Args:
      model: The model.
      paths: The parameters.
      owner: An adapter whose method may have read them.
    """
    places, parameters = _places(model), parameters_of(model)
    for path in paths:
        where, module = path_string(path), places[path][0]
        if merged := _merged_into(module, parameters[path]):
            raise ValueError(
                f"{where}: the adapter {merged[0]!r} is merged into it; unmerge the model first."
            )
        for adapter in _adapters_of(module, parameters[path]):
            if adapter.method.reads_weights and adapter.name != owner:
                raise ValueError(
                    f"{where}: the adapter {adapter.name!r} ({type(adapter.method).__name__}) was "
                    "computed from its values, so other values cannot take their place: detach "
                    f"{adapter.name!r} first, or leave {where} out."
                )


def check_base_values(path: str, layer: Any) -> None:
    """Raises ValueError where a layer's weight has values of adapters."""
    variable = weight_variable(layer)
    for key, values in getattr(layer, "own_values", {}).items():
        if getattr(layer, key, None) is variable:
            owners = ", ".join(map(repr, sorted(values.owners())))
            raise ValueError(
                f"{path} has values of its own in the adapter {owners}, and the method would be "
                f"computed from one of its values and applied to the other: leave {path} out of "
                f"`where`, or detach {owners} first."
            )


def check_can_release(model: Any, names: Collection[str]) -> None:
    """Raises ValueError where other adapters are merged into values of one of these."""
    for one in owned_parameters(model):
        live = one.values.live
        merged = [] if live not in names else _merged_into(one.module, one.variable)
        if merged and live not in merged:
            raise ValueError(
                f"{path_string(one.path)}: the adapter {merged[0]!r} is merged into the values "
                f"of {live!r}, and not into the base's; unmerge the model first."
            )


def check_one_owner(model: Any, active: Collection[str]) -> None:
    """Raises ValueError where two of these adapters have own values for one parameter."""
    for one in owned_parameters(model):
        owners = sorted(one.values.owners() & set(active))
        if len(owners) > 1:
            raise ValueError(
                f"{path_string(one.path)} has own values in each of the adapters "
                f"{', '.join(map(repr, owners))}, and can have one at a time: call "
                f"lro.adapters.activate(model, {owners[0]!r}), say."
            )


def settle(model: Any, active: Collection[str]) -> None:
    """Puts the values of the active adapters in the parameters, and elsewhere the base's."""
    known = adapter_names(model)
    for one in owned_parameters(model):
        values = one.values
        # Values from before there was an adapter of that name stay.
        owners = [n for n in values.owners() if n in active or n not in known]
        values.swap(one.variable, owners[0] if owners else None)


def active_names(model: Any) -> list[str]:
    """The adapters that are applied in some layer."""
    layers = adapted_layers(model).values()
    return list(dict.fromkeys(a.name for x in layers for a in x.adapters.values() if a.active))


@contextlib.contextmanager
def values_of(model: Any, name: str) -> Iterator[None]:
    """While open, parameters have the values of this adapter, and elsewhere the base's."""
    before = [(one, one.values.live) for one in owned_parameters(model)]
    settle(model, [name])
    try:
        yield
    finally:
        for one, live in before:
            one.values.swap(one.variable, live)


def release(model: Any, name: str | None, *, keep: bool) -> None:
    """Forgets the values of an adapter, or of all: the base's return, and the parameter's type.

    Args:
      model: The model.
      name: The adapter; None for all.
      keep: Whether values that are in a parameter stay there, as the base's.
    """
    for one in owned_parameters(model):
        values = one.values
        for owner in [name] if name else sorted(values.owners()):
            if owner == values.live and keep:
                values.drop(None)
                values.live = None
                values.set_type(one.variable)
            elif owner == values.live:
                values.swap(one.variable, None)
            if owner in values.stored():
                values.drop(owner)
        if not values.owners():
            del one.module.own_values[one.key]
        if not one.module.own_values:
            del one.module.own_values


def parameters_of(model: Any, wanted: Any = nnx.Param) -> dict[Path, Any]:
    """The model's own parameters by path, each once, and without the arrays of adapters."""
    return _variables(model, nnx.filterlib.to_predicate(nnx.All(wanted, nnx.Not(AdapterParam))))


def _variables(model: Any, is_meant: Callable[..., bool]) -> dict[Path, Any]:
    return {
        tuple(map(str, path)): x
        for path, x in nnx.iter_graph(model)
        if isinstance(x, nnx.Variable) and is_meant(path, x)
    }


@functools.cache
def _also_trained(cls: type) -> type:
    """`AlsoTrained`, and what the parameter was."""
    if issubclass(cls, AlsoTrained):
        return cls
    if cls is nnx.Param:
        return AlsoTrained
    body = {"type_before": cls, "__module__": cls.__module__, **made_by(_also_trained, cls)}
    return type(cls.__name__, (AlsoTrained, cls), body)


def owned_parameters(model: Any) -> list[OwnedParameter]:
    """The parameters for which some adapter has its own values."""
    places = _places(model)
    return [
        OwnedParameter(path, x, *places[path])
        for path, x in parameters_of(model).items()
        if places[path][1] in getattr(places[path][0], "own_values", {})
    ]


def _places(model: Any) -> dict[Path, tuple[Any, str]]:
    """The module nearest above each parameter, and the parameter's name there, by path."""
    modules = {
        tuple(map(str, path)): x
        for path, x in nnx.iter_graph(model)
        if isinstance(x, nnx.Module) and not isinstance(x, nnx.List | nnx.Dict)
    }
    found = {}
    for path in parameters_of(model):
        above = next(path[:n] for n in range(len(path) - 1, -1, -1) if path[:n] in modules)
        found[path] = modules[above], ".".join(path[len(above) :])
    return found


def _merged_into(module: Any, variable: Any) -> list[str]:
    """The adapters that are merged into a parameter."""
    return [adapter.name for adapter in _adapters_of(module, variable) if adapter.merged]


def _adapters_of(module: Any, variable: Any) -> list[LayerAdapter]:
    """The adapters of the layer whose weight a parameter is."""
    adapters = list(getattr(module, "adapters", {}).values())
    return adapters if adapters and weight_variable(module) is variable else []


def _copy(variable: Any, value: Any) -> AdapterConstant:
    metadata = {k: v for k, v in variable.get_metadata().items() if k in _SHARDING}
    return AdapterConstant(value, **metadata, **({"eager_sharding": False} if metadata else {}))


def _copied(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.copy(x)
