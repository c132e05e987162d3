"""Self-guided training: a dense guide beside structured weights, whose weight falls to zero."""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp

from lowrank_optax.layers.counts import check_count
from lowrank_optax.layers.structured.feed_forward_layers import GuideVariable, StructuredLinear
from lowrank_optax.modules.select import modules_by_path


def self_guided_schedule(steps: int) -> Callable[[jax.Array | int], jax.Array]:
    """Return the schedule of the guide's weight, half a cosine from 1 to 0 at ``steps`` and after.

    Args:
      steps: Length of the guided phase in steps of the optimizer; the paper takes half of the run.

    Returns:
      A function of the step ``t``, which may be traced, to ``(1 + cos(pi t / steps)) / 2`` in
      float32.

    Raises:
      ValueError: If ``steps`` is not a positive integer.

    Example:
      >>> schedule = self_guided_schedule(10)
      >>> print(schedule(0), schedule(5).round(6), schedule(10))
      1.0 0.5 0.0

    Reference:
      Wei et al., 2024, https://arxiv.org/abs/2406.16450, section 3.
    """
    check_count("steps", steps)

    def schedule(step: jax.Array | int) -> jax.Array:
        done = jnp.asarray(step, jnp.float32) / steps
        return jnp.where(done < 1, (1 + jnp.cos(jnp.pi * done)) / 2, 0.0)

    return schedule


def set_guide_weight(
    model: nnx.Module, weight: jax.Array | float, key: jax.Array | None = None
) -> nnx.Module:
    r"""Give the guides of a model their weight :math:`\alpha` in the calls that follow, in place.

    A guided layer computes :math:`\alpha \, x G + (1 - \alpha) \, s(x)`, with the output
    :math:`s(x)` of the factors. With a key, each layer skips its guide in a random
    :math:`1 - \alpha` of the calls, and returns :math:`s(x)` unscaled; this saves half of the
    guide's operations over the guided phase. Call it in the step, on the model that the step
    differentiates.

    Args:
      model: A model with guided layers.
      weight: The guide's weight, from 0 to 1: a number or a scalar that may be traced.
      key: PRNG key of this step and micro-batch; each layer draws with its own part of it. Devices
        that share a batch need the same key. None never skips, as for evaluation.

    Returns:
      The model itself.

    Raises:
      ValueError: If no layer has a guide, or ``weight`` is not a scalar from 0 to 1.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> structure = lro.layers.LowRank(rank=2)
      >>> layer = lro.layers.StructuredLinear(8, 16, structure, guide=True, rngs=nnx.Rngs(0))
      >>> lro.layers.set_guide_weight(layer, 1.0)(jnp.ones((5, 8))).shape
      (5, 16)

    Reference:
      Wei et al., 2024, https://arxiv.org/abs/2406.16450, section 3; skipping is as in its code.
    """
    layers = _guided_layers(model)
    if jnp.ndim(weight) != 0:
        raise ValueError(f"weight must be a scalar, got an array of shape {jnp.shape(weight)}.")
    if not isinstance(weight, jax.core.Tracer) and not 0 <= float(weight) <= 1:
        raise ValueError(f"weight must be from 0 to 1, got {weight}.")
    weight = jnp.asarray(weight, jnp.float32)
    for index, layer in enumerate(layers):
        stack = layer.stack()
        layer.guide_weight = GuideVariable(jnp.broadcast_to(weight, stack))
        if key is None:
            layer.guide_key = nnx.data(None)
        else:
            own = jax.random.fold_in(key, index)
            layer.guide_key = GuideVariable(jax.random.split(own, stack) if stack else own)
    return model


def drop_guides(model: nnx.Module) -> nnx.Module:
    """Remove the guides of a model, in place; call it after the guided phase, outside of ``jit``.

    The model then has other parameters: compile its step again, and carry the optimizer's state
    over with `lowrank_optax.adapters.carry_state`.

    Args:
      model: A model with guided layers.

    Returns:
      The model itself.

    Raises:
      ValueError: If no layer has a guide.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro, optax
      >>> structure = lro.layers.LowRank(rank=2)
      >>> model = lro.layers.StructuredLinear(8, 16, structure, guide=True, rngs=nnx.Rngs(0))
      >>> tx = optax.adam(1e-3)
      >>> opt_state = tx.init(nnx.state(model, nnx.Param))
      >>> params = nnx.state(lro.layers.drop_guides(model), nnx.Param)
      >>> opt_state = lro.adapters.carry_state(tx.init(params), opt_state)
      >>> sorted(opt_state[0].mu)
      ['bias', 'first', 'second']

    Reference:
      Wei et al., 2024, https://arxiv.org/abs/2406.16450, section 3.
    """
    for layer in _guided_layers(model):
        layer.guide = nnx.data(None)
        layer.guide_weight, layer.guide_key = nnx.data(None), nnx.data(None)
    return model


def _guided_layers(model: nnx.Module) -> list[StructuredLinear]:
    is_guided = lambda x: isinstance(x, StructuredLinear) and x.guide is not None
    layers = list(modules_by_path(model, is_guided).values())
    if not layers:
        raise ValueError(
            f"no layer of the {type(model).__name__} has a guide: make StructuredLinear layers "
            "with guide=True."
        )
    return layers
