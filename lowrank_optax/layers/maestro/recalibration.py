"""Running statistics of batch norms, computed again for a model that was cut."""

from collections.abc import Callable, Iterable
from typing import Any

from flax import nnx
import jax.numpy as jnp

from lowrank_optax.layers.maestro.ordered_layer import MaestroLayer
from lowrank_optax.modules.select import modules_by_path


def recalibrate_batch_norm(
    model: nnx.Module, batches: Iterable[Any], call: Callable[[nnx.Module, Any], Any]
) -> nnx.Module:
    """Replace running statistics of batch norms by their averages over batches, in place.

    After a rank has changed, before each evaluation: activations have other means and variances.
    Sampled ranks are removed first, so that statistics are those at the current ranks.

    Args:
      model: A model with ``nnx.BatchNorm`` layers.
      batches: Batches of training data, which all count the same.
      call: Function of the model and a batch that runs the model in training mode; it may be
        compiled by ``nnx.jit``.

    Returns:
      The model itself. Momenta are as before.

    Raises:
      ValueError: If the model has no batch norm, there is no batch, or the call leaves statistics
        unchanged, as in evaluation mode.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> norm, batches = nnx.BatchNorm(1, rngs=nnx.Rngs(0)), jnp.array([[[1.0], [3]], [[5], [7]]])
      >>> _ = lro.layers.maestro.recalibrate_batch_norm(norm, batches, lambda m, x: m(x))
      >>> print(norm.mean[...], norm.var[...])
      [4.] [1.]

    Reference:
      https://github.com/SamuelHorvath/Maestro-LoD, which does not restore the momenta.
    """
    norms = modules_by_path(model, lambda module: isinstance(module, nnx.BatchNorm))
    if not norms:
        raise ValueError(f"the {type(model).__name__} has no nnx.BatchNorm.")
    for layer in modules_by_path(model, lambda m: isinstance(m, MaestroLayer)).values():
        layer.sampled_rank = nnx.data(None)
    variables = [x for norm in norms.values() for x in (norm.mean, norm.var)]
    before = [x[...] for x in variables]
    momenta = [norm.momentum for norm in norms.values()]
    count, sums = 0, [jnp.zeros_like(x) for x in before]
    done = False
    try:
        for norm in norms.values():
            norm.momentum = 0.0  # statistics are then those of the batch
        for batch in batches:
            for norm in norms.values():
                norm.var[...] = jnp.full_like(norm.var[...], -1)  # that of no batch
            call(model, batch)
            if unchanged := [path for path, norm in norms.items() if jnp.any(norm.var[...] < 0)]:
                names = ", ".join(map("/".join, unchanged))
                raise ValueError(
                    f"the call leaves the statistics of {names} unchanged: run the model in "
                    "training mode, as by model.train()."
                )
            count, sums = count + 1, [s + x[...] for s, x in zip(sums, variables, strict=True)]
        if not count:
            raise ValueError("batches has no batch: give batches of training data.")
        done = True
    finally:
        for norm, momentum in zip(norms.values(), momenta, strict=True):
            norm.momentum = momentum
        for x, old, total in zip(variables, before, sums, strict=True):
            x[...] = total / count if done else old
    return model
