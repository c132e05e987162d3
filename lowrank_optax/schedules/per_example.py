"""The noise of a gradient from the gradients of single examples: for small models."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.schedules.gradient_noise import GradientNoise, LossFunction, ratio
from lowrank_optax.states.precision import widened


def per_example_gradients(loss_fn: LossFunction, params: Any, batch: Any) -> Any:
    """The gradient of each example of a batch: a tree of arrays ``[b, *shape of the parameter]``.

    Args:
      loss_fn: ``loss_fn(params, batch) -> mean loss``, a scalar. A layer that mixes examples (batch
        normalisation) has no such gradients.
      params: Parameters.
      batch: A tree of arrays ``[b, ...]``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> loss = lambda params, batch: jnp.mean(params * batch**2)
      >>> print(lro.schedules.per_example_gradients(loss, jnp.float32(1.0), jnp.arange(3.0)))
      [0. 1. 4.]
    """
    alone = lambda example: jax.tree.map(lambda x: x[None], example)
    return jax.vmap(lambda example: jax.grad(loss_fn)(params, alone(example)))(batch)


def per_example_noise(gradients: Any) -> GradientNoise:
    r"""The noise of a gradient from those of its examples, as the tests of batch size define it.

    :math:`V = \sum_i \lVert g_i - g \rVert^2 / (b - 1)` and
    :math:`\mathrm{Var}_i \langle g_i, g \rangle` over the whole gradient. `accumulate_with_noise`
    with groups of one example finds the same in the memory of one gradient.

    Args:
      gradients: A tree of arrays ``[b, ...]`` with ``b >= 2``, of `per_example_gradients`.

    Raises:
      ValueError: If there are fewer than two examples.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> gradients = jnp.array([[1.0, 0.0], [3.0, 1.0], [2.0, -1.0], [2.0, 2.0]])
      >>> noise = lro.schedules.per_example_noise(gradients)
      >>> print(f"{noise.variance:.4f} {noise.inner_product_variance:.2f}")
      2.3333 3.75

    Reference:
      Lau et al., AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods, 2024,
      https://arxiv.org/abs/2402.11215, section 3. The official code sums the second over tensors.
    """
    count = _count(gradients)
    wide = widened(gradients)
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), wide)
    norm = optax.tree.norm(mean, squared=True)
    away = jax.tree.map(jnp.subtract, wide, mean)
    along = jax.vmap(optax.tree.vdot, (0, None))(away, mean)
    return GradientNoise(
        squared_norm=norm,
        variance=optax.tree.norm(away, squared=True) / (count - 1),
        batch_size=jnp.float32(count),
        inner_product_variance=jnp.sum(along**2) / (count - 1),
    )


def coordinate_wise_batch_size(
    gradients: Any, eta: float = 0.1, quantile: float = 0.9
) -> jax.Array:
    r"""The batch size at which the norm test holds in (nearly) every coordinate by itself.

    A quantile over coordinates :math:`j` of :math:`\mathrm{Var}_i(g_{ij}) / (\eta^2 g_j^2)`. The
    theory of AdaGrad asks for the largest, which explodes wherever some :math:`g_j` is nearly zero.

    Args:
      gradients: A tree of arrays ``[b, ...]`` with ``b >= 2``, of `per_example_gradients`.
      eta: Of the test.
      quantile: Share of the coordinates that are to pass; 1.0 for all.

    Returns:
      A float32 scalar, neither rounded nor bounded; infinite where a coordinate is only noise.

    Raises:
      ValueError: If there are fewer than two examples, or ``eta`` or ``quantile`` is out of range.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> gradients = jnp.array([[1.0, 0.0], [3.0, 1.0], [2.0, -1.0], [2.0, 2.0]])
      >>> size = lro.schedules.coordinate_wise_batch_size(gradients, eta=0.5, quantile=1.0)
      >>> print(f"{size:.3f}")
      26.667

    Reference:
      https://arxiv.org/abs/2402.11215, the coordinate-wise norm test; absent from the official
      code.
    """
    if not eta > 0:
        raise ValueError(f"eta={eta} must be positive.")
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile={quantile} must be above 0, and 1 at most.")
    _count(gradients)

    def sizes(g: jax.Array) -> jax.Array:
        return ratio(jnp.var(g, axis=0, ddof=1), eta**2 * jnp.mean(g, axis=0) ** 2).ravel()

    each = jnp.concatenate([sizes(g) for g in jax.tree.leaves(widened(gradients))])
    return jnp.quantile(each, quantile, method="higher")  # others would make NaN of infinities


def _count(gradients: Any) -> int:
    counts = {len(g) for g in jax.tree.leaves(gradients)}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            "gradients must be [b, ...] for the same b >= 2 examples in every leaf, not of the "
            f"shapes {[g.shape for g in jax.tree.leaves(gradients)]}."
        )
    return counts.pop()
