"""Training of the model's own parameters beside adapters, and freezing of adapters' arrays."""

from collections.abc import Callable
from typing import Any, TypeAlias

from flax import nnx

from lowrank_optax.adapters.adapted_layers import (
    AdapterConstant,
    AdapterParam,
    adapter_names,
    check_names,
)
from lowrank_optax.adapters.own_values import active_names, claim, parameters_of, retype
from lowrank_optax.matrices.selection import matching, path_string

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
      The paths of what is trained now.

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
    """Trains some arrays of adapters no more: their types change in place to `AdapterConstant`.

    At the next compilation their gradients and optimizer state are gone, which masked updates do
    not save: the second phase of methods that freeze as they go (AFLoRA, LaMDA). Make the optimizer
    anew afterwards.

    Args:
      model: A model with adapters.
      names: Which: a regular expression that is the whole of an array's name (``"B"``, ``"A|B"``)
        or found in its path (``"query/.*/B$"``), or a function of path and variable.

    Returns:
      The paths of what is frozen now.

    Raises:
      ValueError: If there are none.

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
    arrays = _variables(model, AdapterParam)
    if isinstance(names, str) and "/" not in names:
        names = rf"(^|/)({names})$"
    paths = matching("names", arrays, names, "trained array of an adapter")
    for path in paths:
        retype(arrays[path], AdapterConstant)
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


def _variables(model: Any, wanted: Any) -> dict[tuple[str, ...], Any]:
    """Variables by path, each once."""
    found = nnx.filterlib.to_predicate(wanted)
    return {
        tuple(map(str, path)): x
        for path, x in nnx.iter_graph(model)
        if isinstance(x, nnx.Variable) and found(path, x)
    }
