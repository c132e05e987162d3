"""The noise of a gradient, measured on groups of examples or on single ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.states.precision import to_float32

LossFunction = Callable[[Any, Any], jax.Array]  # (params, batch [m, ...]) -> mean over the batch


class GradientNoise(NamedTuple):
    r"""How much the gradients of single examples scatter around their mean; float32 scalars.

    Attributes:
      squared_norm: :math:`\lVert g \rVert^2` of the mean gradient :math:`g` over the batch.
      variance: :math:`V`, the variance of one example's gradient, summed over coordinates.
      batch_size: :math:`b`, the number of examples in the batch.
      inner_product_variance: :math:`\mathrm{Var}_i \langle g_i, g \rangle`, or None if it was not
        measured.
    """

    squared_norm: jax.Array
    variance: jax.Array
    batch_size: jax.Array
    inner_product_variance: jax.Array | None = None

    @property
    def signal(self) -> jax.Array:
        """The squared norm of the gradient without noise, unbiased: it may be negative."""
        return self.squared_norm - self.variance / self.batch_size

    @property
    def noise_scale(self) -> jax.Array:
        """The batch size at which noise equals signal; infinite without a signal."""
        return ratio(self.variance, self.signal)


def ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x / y`` for ``x >= 0``: infinite where ``y`` is not positive, zero where ``x`` is zero."""
    return jnp.where(x == 0, 0.0, jnp.where(y > 0, x / jnp.where(y > 0, y, 1.0), jnp.inf))


def accumulate_with_noise(
    loss_fn: LossFunction,
    params: Any,
    batch: Any,
    *,
    inner_product: bool = False,
    direction: Any = None,
    sizes: jax.Array | None = None,
    groups: jax.typing.ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, Any, GradientNoise]:
    r"""Loss and gradient over the groups of a batch, and the noise of that gradient.

    One loop over :math:`J` groups of :math:`m` examples sums their mean gradients :math:`G_j` and
    the squared norms. With :math:`b = Jm` and :math:`g` the mean of all,

    .. math::
      \hat V = \frac{m}{J - 1} \Big( \sum_j \lVert G_j \rVert^2 - J \lVert g \rVert^2 \Big)

    is an unbiased estimate of the variance of one example's gradient. The cost is ``J`` norms, and
    no second gradient is in memory.

    Args:
      loss_fn: ``loss_fn(params, group) -> mean loss of the group``, a scalar.
      params: Parameters of any floating dtype; sums are float32.
      batch: A tree of arrays ``[J, m, ...]``.
      inner_product: Whether to measure the variance along the gradient as well, which computes
        every gradient a second time.
      direction: A tree like ``params`` to measure the variance along instead, independent of the
        batch, such as the first moment of an optimizer: no second pass. The result is scaled as if
        the gradient had this direction.
      sizes: Positive weights ``[J]`` of the groups if they differ (such as numbers of tokens that
        are not padding). They are then the unit of ``variance`` and ``batch_size``.
      groups: Traced number of groups to use, if not all ``J``: one compiled program then serves
        every batch size. Below 2 the noise is NaN.
      axis_name: Mesh axes over which ``batch`` is split, inside ``jax.shard_map``, with the same
        parameters on all devices. The results are over all devices' groups; one group per device is
        enough. Leave it out under automatic sharding: groups are then the micro-batches.

    Returns:
      The mean loss, float32; the mean gradient, in the parameters' dtypes; and the `GradientNoise`.

    Raises:
      ValueError: If leaves of ``batch`` are not all ``[J, m, ...]``, or there are fewer than two
        groups.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> gradients = jnp.array([[1.0, 0.0], [3.0, 1.0], [2.0, -1.0], [2.0, 2.0]])
      >>> loss = lambda params, group: jnp.mean(group @ params)
      >>> batch = gradients.reshape(4, 1, 2)  # four groups of one example
      >>> value, gradient, noise = lro.training.accumulate_with_noise(loss, jnp.ones(2), batch)
      >>> print(gradient, f"{noise.variance:.4f} {noise.squared_norm:.4f}")
      [2.  0.5] 2.3333 4.2500
      >>> print(f"noise scale: {noise.noise_scale:.2f} examples")
      noise scale: 0.64 examples

    Reference:
      Lau et al., Adaptive Batch Size Schemes for Distributed Training of Language Models with Data
      and Model Parallelism, 2024, https://arxiv.org/abs/2412.21124. The noise scale: McCandlish et
      al., An Empirical Model of Large-Batch Training, 2018, https://arxiv.org/abs/1812.06162.
    """
    shapes = [x.shape for x in jax.tree.leaves(batch)]
    if len({shape[:2] for shape in shapes}) != 1 or len(shapes[0]) < 2:
        raise ValueError(
            "every leaf of batch must be [J, m, ...], with the same J groups of m examples; their "
            f"shapes are {shapes}."
        )
    count, size = shapes[0][:2]
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    if count * devices < 2:
        raise ValueError(
            "accumulate_with_noise cannot measure noise on one group: batch must be [J, m, ...] "
            f"with J >= 2, not J = {count}."
        )
    used = count if groups is None else groups
    value_and_grad = jax.value_and_grad(loss_fn)

    def varying(tree: Any) -> Any:
        """The tree as one that may differ between devices, for the types of ``jax.shard_map``."""
        return tree if axis_name is None else jax.lax.pcast(tree, axis_name, to="varying")

    # Otherwise the gradient of replicated parameters would be summed over the devices.
    local, direction = varying(params), to_float32(direction)

    def add_up(terms: Callable[[Any], Any], zeros: Any) -> Any:
        """The sums over the groups of all devices of weight times ``terms(group)``."""

        def add(index: jax.Array, sums: Any) -> Any:
            take = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
            weight = 1.0 if sizes is None else take(sizes).astype(jnp.float32)
            new = terms(jax.tree.map(take, batch))
            return jax.tree.map(lambda total, x: total + weight * x, sums, new)

        sums = jax.lax.fori_loop(0, used, add, varying(zeros))
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    def of_group(group: Any) -> tuple[Any, ...]:
        loss, gradient = to_float32(value_and_grad(local, group))
        dot = 0.0 if direction is None else optax.tree.vdot(gradient, direction)
        return loss, gradient, optax.tree.norm(gradient, squared=True), dot**2, 1.0

    zero = jnp.zeros([])
    zeros = (zero, jax.tree.map(jnp.zeros_like, to_float32(params)), zero, zero, zero)
    loss, gradient, squared_norms, dots_squared, weights = add_up(of_group, zeros)
    # Without sizes each group stands for ``size`` examples.
    unit, total = size if sizes is None else 1, used * devices
    weights = total if sizes is None else weights
    per_example = lambda squares: unit * jnp.maximum(squares, 0.0) / (total - 1)

    gradient = jax.tree.map(lambda g: g / weights, gradient)
    norm = optax.tree.norm(gradient, squared=True)
    along = None
    if direction is not None:
        mean = optax.tree.vdot(gradient, direction)
        along = per_example(dots_squared - weights * mean**2)
        along *= norm / optax.tree.norm(direction, squared=True)
    elif inner_product:
        center = varying(gradient)

        def deviation(group: Any) -> Any:
            _, each = to_float32(value_and_grad(local, group))
            return (optax.tree.vdot(each, center) - norm) ** 2

        along = per_example(add_up(deviation, zero))
    noise = GradientNoise(
        squared_norm=norm,
        variance=per_example(squared_norms - weights * norm),
        batch_size=jnp.asarray(unit * weights, jnp.float32),
        inner_product_variance=along,
    )
    return loss / weights, optax.tree.cast_like(gradient, params), noise


def per_example_gradients(loss_fn: LossFunction, params: Any, batch: Any) -> Any:
    """The gradient of each example: a tree of arrays ``[b, *parameter shape]``, for small models.

    Args:
      loss_fn: ``loss_fn(params, batch) -> mean loss``, a scalar. Layers that mix examples, such as
        batch normalization, have no such gradients.
      params: Parameters.
      batch: A tree of arrays ``[b, ...]``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> loss = lambda params, batch: jnp.mean(params * batch**2)
      >>> print(lro.training.per_example_gradients(loss, jnp.float32(1.0), jnp.arange(3.0)))
      [0. 1. 4.]
    """
    alone = lambda example: jax.tree.map(lambda x: x[None], example)
    return jax.vmap(lambda example: jax.grad(loss_fn)(params, alone(example)))(batch)


def per_example_noise(gradients: Any) -> GradientNoise:
    r"""The noise of a gradient, computed exactly from the gradients of its examples.

    :math:`V = \sum_i \lVert g_i - g \rVert^2 / (b - 1)`, and
    :math:`\mathrm{Var}_i \langle g_i, g \rangle` over the whole gradient. `accumulate_with_noise`
    with groups of one example returns the same with one gradient in memory.

    Args:
      gradients: A tree of arrays ``[b, ...]`` with ``b >= 2``, see `per_example_gradients`.

    Raises:
      ValueError: If there are fewer than two examples.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> gradients = jnp.array([[1.0, 0.0], [3.0, 1.0], [2.0, -1.0], [2.0, 2.0]])
      >>> noise = lro.training.per_example_noise(gradients)
      >>> print(f"{noise.variance:.4f} {noise.inner_product_variance:.2f}")
      2.3333 3.75

    Reference:
      Lau et al., AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods, 2024,
      https://arxiv.org/abs/2402.11215, section 3. The official code sums the second over tensors.
    """
    count = _count_examples(gradients)
    gradients = to_float32(gradients)
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
    deviations = jax.tree.map(jnp.subtract, gradients, mean)
    along = jax.vmap(optax.tree.vdot, (0, None))(deviations, mean)
    return GradientNoise(
        squared_norm=optax.tree.norm(mean, squared=True),
        variance=optax.tree.norm(deviations, squared=True) / (count - 1),
        batch_size=jnp.float32(count),
        inner_product_variance=jnp.sum(along**2) / (count - 1),
    )


def coordinate_wise_batch_size(
    gradients: Any, eta: float = 0.1, quantile: float = 0.9
) -> jax.Array:
    r"""The batch size at which (nearly) every coordinate passes the norm test by itself.

    It is a quantile over coordinates :math:`j` of
    :math:`\mathrm{Var}_i(g_{ij}) / (\eta^2 g_j^2)`. The theory of AdaGrad needs the maximum, which
    explodes if some :math:`g_j` is nearly zero.

    Args:
      gradients: A tree of arrays ``[b, ...]`` with ``b >= 2``, see `per_example_gradients`.
      eta: Threshold of the norm test.
      quantile: Fraction of the coordinates that must pass; 1.0 for all.

    Returns:
      A float32 scalar, neither rounded nor bounded; infinite if a coordinate is only noise.

    Raises:
      ValueError: If there are fewer than two examples, or ``eta`` or ``quantile`` is out of range.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> gradients = jnp.array([[1.0, 0.0], [3.0, 1.0], [2.0, -1.0], [2.0, 2.0]])
      >>> size = lro.training.coordinate_wise_batch_size(gradients, eta=0.5, quantile=1.0)
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
    _count_examples(gradients)

    def sizes(g: jax.Array) -> jax.Array:
        return ratio(jnp.var(g, axis=0, ddof=1), eta**2 * jnp.mean(g, axis=0) ** 2).ravel()

    each = jnp.concatenate([sizes(g) for g in jax.tree.leaves(to_float32(gradients))])
    return jnp.quantile(each, quantile, method="higher")  # others would make NaN of infinities


def _count_examples(gradients: Any) -> int:
    shapes = [g.shape for g in jax.tree.leaves(gradients)]
    if len({shape[:1] for shape in shapes}) != 1 or shapes[0][:1] < (2,):
        raise ValueError(
            "gradients must be [b, ...] for the same b >= 2 examples in every leaf; their shapes "
            f"are {shapes}."
        )
    return shapes[0][0]
