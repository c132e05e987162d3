"""The noise of a gradient, measured on the groups of examples whose mean it is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.states.precision import widened

LossFunction = Callable[[Any, Any], jax.Array]  # (params, batch [m, ...]) -> mean over the batch


class GradientNoise(NamedTuple):
    r"""How much the gradients of single examples scatter around their mean; float32 scalars.

    Attributes:
      squared_norm: :math:`\lVert g \rVert^2` of the mean gradient :math:`g` over the batch.
      variance: :math:`V`, the variance of one example's gradient, summed over coordinates.
      batch_size: :math:`b`, the examples in the batch.
      inner_product_variance: :math:`\mathrm{Var}_i \langle g_i, g \rangle`, or None if it was not
        asked for.
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
        """Examples after which noise and signal are equal; infinite where there is no signal."""
        return ratio(self.variance, self.signal)


def ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x / y`` for ``x >= 0``: infinite where ``y`` is not positive, zero where ``x`` is zero."""
    whole = jnp.where(y > 0, x / jnp.where(y > 0, y, 1.0), jnp.inf)
    return jnp.where(x == 0, 0.0, whole)


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

    One loop over :math:`J` groups of :math:`m` examples adds up their mean gradients :math:`G_j`
    and their squared norms. With :math:`b = Jm` and :math:`g` the mean of all,

    .. math::
      \hat V = \frac{m}{J - 1} \Big( \sum_j \lVert G_j \rVert^2 - J \lVert g \rVert^2 \Big)

    is an unbiased estimate of the variance of one example's gradient, however ``b`` is divided. No
    example's gradient is made, and no second gradient kept: the cost is ``J`` norms. In the same
    way :math:`\frac{m}{J - 1} \sum_j (\langle G_j, d \rangle - \langle g, d \rangle)^2` is
    unbiased for :math:`d^\top \Sigma d`, for a ``direction`` :math:`d` that does not depend on the
    batch. The inner-product test has :math:`d = g`, which is known only after the loop:
    ``inner_product=True`` computes every gradient a second time.

    Args:
      loss_fn: ``loss_fn(params, group) -> mean loss of the group``, a scalar.
      params: Parameters, of any floating dtype; sums are float32.
      batch: A tree of arrays ``[J, m, ...]``.
      inner_product: Whether to measure the variance along the gradient as well.
      direction: A tree like ``params`` to measure it along instead, such as the first moment of an
        optimizer: this costs ``J`` inner products, not a second pass. The result is what the
        gradient's would be if it had this direction: it is scaled by
        :math:`\lVert g \rVert^2 / \lVert d \rVert^2`.
      sizes: ``[J]``, positive, if groups do not all count the same (tokens that are no padding,
        where a loss is a mean over those): weights of the groups, and what ``variance`` and
        ``batch_size`` are then in units of.
      groups: Traced number of groups to use, if not all ``J``: one compiled program then serves
        every batch size. At least 2, or the noise is NaN.
      axis_name: Mesh axes over which ``batch`` is split, inside ``jax.shard_map``. Loss, gradient
        and noise are of all devices' groups; norms are taken before gradients are averaged, so one
        group on each device is enough. Parameters are the same on all. Under automatic sharding
        leave it out: groups are then the micro-batches.

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
      >>> value, gradient, noise = lro.schedules.accumulate_with_noise(loss, jnp.ones(2), batch)
      >>> print(gradient, f"{noise.variance:.4f} {noise.squared_norm:.4f}")
      [2.  0.5] 2.3333 4.2500
      >>> print(f"noise scale: {noise.noise_scale:.2f} examples")
      noise scale: 0.64 examples

    Reference:
      Lau et al., Adaptive Batch Size Schemes for Distributed Training of Language Models with Data
      and Model Parallelism, 2024, https://arxiv.org/abs/2412.21124. The noise scale: McCandlish et
      al., An Empirical Model of Large-Batch Training, 2018, https://arxiv.org/abs/1812.06162.
    """
    count, size = _groups_of(batch)
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    if count * devices < 2:
        raise ValueError(
            "accumulate_with_noise cannot measure noise on one group: batch must be [J, m, ...] "
            f"with J >= 2, not J = {count}."
        )
    used = count if groups is None else groups
    value_and_grad = jax.value_and_grad(loss_fn)
    # Else the gradient of parameters that are the same on all would be summed over the devices.
    local, direction = _varying(params, axis_name), widened(direction)

    def add_up(terms: Callable[[Any, jax.typing.ArrayLike], Any], zeros: Any) -> Any:
        """Sums ``terms(group, weight)`` over the groups of all devices."""

        def add(index: jax.Array, sums: Any) -> Any:
            take = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
            weight = 1.0 if sizes is None else take(sizes).astype(jnp.float32)
            return jax.tree.map(jnp.add, sums, terms(jax.tree.map(take, batch), weight))

        sums = jax.lax.fori_loop(0, used, add, _varying(zeros, axis_name))
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    def of_group(group: Any, weight: jax.typing.ArrayLike) -> _Sums:
        loss, gradient = widened(value_and_grad(local, group))
        dot = 0.0 if direction is None else optax.tree.vdot(gradient, direction)
        terms = _Sums(loss, gradient, optax.tree.norm(gradient, squared=True), dot**2, 1.0)
        return jax.tree.map(lambda x: weight * x, terms)

    zero = jnp.zeros([])
    zeros = jax.tree.map(jnp.zeros_like, widened(params))
    sums = add_up(of_group, _Sums(zero, zeros, zero, zero, zero))
    # Weights are sizes, or all 1: then each stands for ``size`` examples.
    unit, total = size if sizes is None else 1, used * devices
    weights = total if sizes is None else sums.weights
    per_example = lambda squares: unit * jnp.maximum(squares, 0.0) / (total - 1)

    gradient = jax.tree.map(lambda g: g / weights, sums.gradient)
    norm = optax.tree.norm(gradient, squared=True)
    along = None
    if direction is not None:
        mean = optax.tree.vdot(gradient, direction)
        along = per_example(sums.dots_squared - weights * mean**2)
        along *= norm / optax.tree.norm(direction, squared=True)
    elif inner_product:
        center = _varying(gradient, axis_name)

        def deviation(group: Any, weight: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
            _, each = widened(value_and_grad(local, group))
            return weight * (optax.tree.vdot(each, center) - norm) ** 2

        along = per_example(add_up(deviation, zero))
    noise = GradientNoise(
        squared_norm=norm,
        variance=per_example(sums.squared_norms - weights * norm),
        batch_size=jnp.asarray(unit * weights, jnp.float32),
        inner_product_variance=along,
    )
    return sums.loss / weights, optax.tree.cast_like(gradient, params), noise


class _Sums(NamedTuple):
    """What is summed over groups, each times its weight."""

    loss: Any
    gradient: Any
    squared_norms: Any
    dots_squared: Any  # of inner products with the direction
    weights: Any


def _groups_of(batch: Any) -> tuple[int, int]:
    """``J`` and ``m`` of a batch ``[J, m, ...]``."""
    shapes = {x.shape[:2] for x in jax.tree.leaves(batch)}
    if len(shapes) != 1 or len(shape := shapes.pop()) < 2:
        found = [x.shape for x in jax.tree.leaves(batch)]
        raise ValueError(
            "every leaf of batch must be [J, m, ...], with the same J groups of m examples, not "
            f"of the shapes {found}."
        )
    return shape


def _varying(tree: Any, axis_name: str | tuple[str, ...] | None) -> Any:
    """The tree as one that may differ from device to device, for the types of ``jax.shard_map``."""
    return tree if axis_name is None else jax.lax.pcast(tree, axis_name, to="varying")
