"""AdaGrad-Norm: gradient descent divided by the root of the sum of all squared norms so far."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.quantization import Bits
from lowrank_optax.states.assemble import optimizer
from lowrank_optax.states.precision import scalar_dtype, to_float32


class ScaleByAdagradNormState(NamedTuple):
    """State of `scale_by_adagrad_norm`.

    Attributes:
      sum_of_squares: Sum over all gradients so far, a float32 scalar (float64 if a parameter is);
        with ``axis`` an array per parameter, of size 1 along every summed axis.
    """

    sum_of_squares: Any


def scale_by_adagrad_norm(
    initial_accumulator_value: jax.typing.ArrayLike = 0.1,
    eps: jax.typing.ArrayLike = 1e-7,
    axis: int | tuple[int, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients by the root of the sum of their squared norms.

    .. math::
      s_t = s_{t-1} + \lVert g_t \rVert^2, \qquad u_t = g_t / \sqrt{s_t + \epsilon},

    with the norm of the whole gradient, or of each slice along ``axis``; 0 where :math:`s_t` is 0.

    Args:
      initial_accumulator_value: Start :math:`s_0 \ge 0`; this and ``eps`` as in ``optax.adagrad``.
        The official code has 1e-2 and 1e-10.
      eps: Term added to the sum under the root.
      axis: Axis, or axes, of each parameter whose slices have separate sums: -1 for the columns of
        kernels ``[d_in, d_out]`` and filters of convolutions, (0, -1) for those of stacked layers.
        Axes that a parameter lacks are ignored. None for one sum of everything.

    Returns:
      A transformation with the state `ScaleByAdagradNormState`.

    Raises:
      TypeError: If ``axis`` is not an int, a tuple or None.
      ValueError: If ``initial_accumulator_value`` or ``eps`` is negative.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> gradient = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]])}
      >>> tx = lro.scale_by_adagrad_norm(initial_accumulator_value=0.0, axis=-1)
      >>> updates, state = tx.update(gradient, tx.init(gradient))
      >>> print([f"{x:.1f}" for x in updates["kernel"].ravel()], state.sum_of_squares["kernel"])
      ['0.6', '0.0', '0.8', '1.0'] [[25.  4.]]

    Reference:
      Ward et al., AdaGrad stepsizes, 2019, https://arxiv.org/abs/1806.01811, Algorithm 1. ``axis``:
      the official code of https://arxiv.org/abs/2402.11215.
    """
    for name, value in (("initial_accumulator_value", initial_accumulator_value), ("eps", eps)):
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"{name}={value} must not be negative.")
    if not (axis is None or isinstance(axis, int | tuple)):
        raise TypeError(
            f"axis={axis!r} must be an int, a tuple of them or None (name it in the static_args of "
            "optax.inject_hyperparams)."
        )

    def init_fn(params: optax.Params) -> ScaleByAdagradNormState:
        first = lambda tree: jnp.asarray(initial_accumulator_value, scalar_dtype(tree))
        if axis is None:
            return ScaleByAdagradNormState(first(params))
        axes = (axis,) if isinstance(axis, int) else axis

        def start(p: jax.Array) -> jax.Array:
            separate = {a % p.ndim for a in axes if -p.ndim <= a < p.ndim}
            shape = tuple(d if i in separate else 1 for i, d in enumerate(p.shape))
            # Computed from the parameter, for its sharding on an explicit mesh.
            return first(p) + _sum_of_squares(jnp.zeros_like(p, scalar_dtype(p)), shape)

        return ScaleByAdagradNormState(jax.tree.map(start, params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleByAdagradNormState]:
        del params, extra_args
        gradients = to_float32(updates)
        inverse_root = lambda s: jnp.where(s == 0, 0.0, jax.lax.rsqrt(s + eps))
        if axis is None:
            sums = state.sum_of_squares + optax.tree.norm(gradients, squared=True)
            sums = sums.astype(state.sum_of_squares.dtype)
            scaled = jax.tree.map(lambda g: g * inverse_root(sums), gradients)
        else:
            add = lambda s, g: (s + _sum_of_squares(g, s.shape)).astype(s.dtype)
            sums = jax.tree.map(add, state.sum_of_squares, gradients)
            scaled = jax.tree.map(lambda g, s: g * inverse_root(s), gradients, sums)
        return optax.tree.cast_like(scaled, updates), ScaleByAdagradNormState(sums)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@explains_names
def adagrad_norm(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator_value: jax.typing.ArrayLike = 0.1,
    eps: jax.typing.ArrayLike = 1e-7,
    weight_decay: jax.typing.ArrayLike = 0.0,
    *,
    axis: int | tuple[int, ...] | None = None,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    state_bits: Bits | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaGrad-Norm: gradient descent that adapts its step size with one number of state.

    .. math::
      s_t = s_{t-1} + \lVert g_t \rVert^2, \qquad
      x_{t+1} = x_t - \eta \, (g_t / \sqrt{s_t + \epsilon} + \lambda x_t).

    It converges for any :math:`\eta`; ``optax.adagrad`` has a sum for each parameter instead.

    Args:
      learning_rate: A float or an optax schedule; a distance rather than a rate.
      initial_accumulator_value, eps, axis: As in `scale_by_adagrad_norm`.
      weight_decay: Decoupled decay :math:`\lambda`.
      weight_decay_mask: Which leaves decay, as ``mask`` of ``optax.adamw``.
      state_bits: Bits of the sums between steps, 8 or 4: see `low_bit`; None for float32.

    Returns:
      The optimizer.

    Raises:
      TypeError: If ``axis`` is not an int, a tuple or None.
      ValueError: If ``initial_accumulator_value`` or ``eps`` is negative.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.adagrad_norm(1.0)
      >>> params = jnp.array([3.0, -4.0])
      >>> state = tx.init(params)
      >>> for _ in range(50):
      ...     updates, state = tx.update(params, state)  # the gradient of ‖x‖² / 2
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{jnp.linalg.norm(params):.3f}")
      0.014

    Reference:
      Ward et al., AdaGrad stepsizes, 2019, https://arxiv.org/abs/1806.01811, Algorithm 1; with
      growing batches, Lau et al., 2024, https://arxiv.org/abs/2402.11215.
    """
    scaled = scale_by_adagrad_norm(initial_accumulator_value, eps, axis)
    return optimizer(scaled, learning_rate, weight_decay, weight_decay_mask, state_bits=state_bits)


def _sum_of_squares(gradient: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The sum of squares over the axes of size 1 in ``shape``."""
    axes = [i for i, d in enumerate(shape) if d == 1]
    return jnp.sum(jnp.square(gradient), axes, keepdims=True)
