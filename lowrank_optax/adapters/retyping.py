"""What of a model is trained beside its adapters, and what of its adapters is trained no more."""

from collections.abc import Callable
import functools
from typing import Any, TypeAlias

from flax import nnx

from lowrank_optax.adapters.nnx import AdapterConstant, AdapterParam, AlsoTrained
from lowrank_optax.matrices.selection import matching, path_string

Arrays: TypeAlias = str | Callable[[tuple[str, ...], Any], bool]


def also_train(model: Any, where: Any) -> list[str]:
    """Trains parameters of the model itself beside its adapters (PEFT's ``modules_to_save``).

    Their types change in place to `AlsoTrained`, which ``lro.adapters.trainable`` has; they are
    still ``nnx.Param``. `detach` of the last adapter gives the types back. Do this before the
    optimizer is made.

    Args:
      model: Any NNX model.
      where: Which: a regular expression found in the parameter's path (``norm/scale``), or any
        filter of ``flax.nnx``.

    Returns:
      The paths of what is trained now.

    Raises:
      ValueError: If ``where`` matches no parameter; the message lists near ones.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.LayerNorm(2, rngs=rngs))
      >>> lro.adapters.also_train(model, "scale|bias$")
      ['layers/0/bias', 'layers/1/bias', 'layers/1/scale']
    """
    params = _variables(model, nnx.All(nnx.Param, nnx.Not(AdapterParam)))
    paths = matching("where", params, where, "parameter")
    for path in paths:
        _retype(params[path], _also_trained(type(params[path])))
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
        _retype(arrays[path], AdapterConstant)
    return [path_string(path) for path in paths]


def restore_types(model: Any) -> None:
    """Parameters of `also_train` are again of the types that they were."""
    for variable in _variables(model, AlsoTrained).values():
        _retype(variable, variable.type_before)


def _variables(model: Any, wanted: Any) -> dict[tuple[str, ...], Any]:
    """Variables by path, each once."""
    found = nnx.filterlib.to_predicate(wanted)
    return {
        tuple(map(str, path)): x
        for path, x in nnx.iter_graph(model)
        if isinstance(x, nnx.Variable) and found(path, x)
    }


def _retype(variable: Any, cls: type) -> None:
    # Variables refuse attributes; their class is read from the object at every split.
    object.__setattr__(variable, "__class__", cls)


@functools.cache
def _also_trained(cls: type) -> type:
    """`AlsoTrained`, and what the parameter was."""
    if issubclass(cls, AlsoTrained):
        return cls
    if cls is nnx.Param:
        return AlsoTrained
    return type(
        cls.__name__, (AlsoTrained, cls), {"type_before": cls, "__module__": cls.__module__}
    )
