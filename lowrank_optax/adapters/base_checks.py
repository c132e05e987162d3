"""Whether restored adapters fit the base that they are attached to, in Flax NNX."""

from flax import nnx

from lowrank_optax.adapters.adapted_layers import AdapterParam, adapted_layers, weight_matrix
from lowrank_optax.adapters.base import Adapter, AdapterParams
from lowrank_optax.matrices.selection import path_string


def check_base(model: nnx.Module) -> None:
    """Checks that adapters were made of the weights they are on, as far as their arrays tell.

    Call it after an adapter has been restored from a checkpoint: `SaRA` holds the entries that it
    selected, and compares them. Methods whose arrays say nothing of the weights always pass, and so
    do merged adapters.

    Args:
      model: The model that `attach` was given.

    Raises:
      ValueError: If a layer's weight is not the one that its adapter was made of.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
      >>> _ = lro.adapters.attach(model, lro.adapters.SaRA(fraction=0.5), rngs=0)
      >>> lro.adapters.check_base(model)
    """
    for path, layer in adapted_layers(model).items():
        for adapter in layer.adapters.values():
            says_nothing = type(adapter.method).check_base is Adapter.check_base
            if says_nothing or adapter.merged or adapter.group is not None:
                continue
            weights = weight_matrix(layer)
            batch = weights.ndim - 2
            params = AdapterParams({}, {})
            for name, x in adapter.arrays.items():
                arrays = params.trainable if isinstance(x, AdapterParam) else params.frozen
                arrays[name] = x[...].reshape(-1, *x[...].shape[batch:])
            try:
                adapter.method.check_base(params, weights.reshape(-1, *weights.shape[batch:]))
            except ValueError as error:
                where = f"the adapter {adapter.name!r} of {path_string(path)}"
                raise ValueError(f"{where} was made of another weight: {error}") from error
