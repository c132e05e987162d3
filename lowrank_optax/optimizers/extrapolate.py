"""Extrapolation from the past as an optimizer, whose parameters are the points ahead."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.optimizers.lookahead import Direction, check_inner_learning_rate, direction_from
from lowrank_optax.slices.call import Whole
from lowrank_optax.states.arguments import refuse_unused, transformation
from lowrank_optax.states.precision import to_float32


class ExtrapolateState(NamedTuple):
    """State of `extrapolate`.

    Attributes:
      count: Number of updates so far, int32.
      displacement: The weights minus the parameters, in their shapes and dtypes: the inner learning
        rate times the direction of the last gradient.
      inner: State of the inner optimizer.
    """

    count: Any
    displacement: Any
    inner: Any


def extrapolate(
    inner: optax.GradientTransformation,
    inner_learning_rate: optax.ScalarOrSchedule,
    *,
    direction: Direction = "gradient",
    max_norm: jax.typing.ArrayLike | None = None,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer whose gradients are taken ahead of the weights, as a plain transformation.

    The weights :math:`w` move by the optimizer's updates :math:`u`; gradients are taken at
    :math:`h`, ahead of the weights along the last gradient:

    .. math::
      h_t = w_t - \hat\gamma_t g_{t-1}, \qquad g_t = \nabla f(h_t), \qquad w_{t+1} = w_t + u_t(g_t).

    The parameters of the training loop are :math:`h`, with :math:`g_{-1} = 0`; evaluate, average
    and export :math:`w`, which is ``extrapolation_eval_params(params, state)``. The steps are those
    of `extrapolated_value_and_grad` with ``"past_global"`` and one worker, whose loop has :math:`w`
    as parameters: prefer it in bfloat16, since this form rounds :math:`h`. With ``optax.sgd`` this
    is optimistic gradient descent (``optax.optimistic_gradient_descent`` has
    :math:`g_{-1} = g_0`).

    Args:
      inner: The optimizer; its ``params`` are :math:`w`.
      inner_learning_rate: Step :math:`\hat\gamma \ge 0`: a float, a traced scalar, or a schedule of
        the number of steps.
      direction: Replacement of the last gradient: see `extrapolated_value_and_grad`.
      max_norm: Largest norm of the direction; None for no bound.
      weight_dimension_numbers: Which leaves are stacked matrices, for ``direction="normalized"``:
        see `scale_by_projection`.

    Returns:
      A transformation with the state `ExtrapolateState`. Numbers of a gradient that are not finite
      are not extrapolated.

    Raises:
      ValueError: If an argument is out of range, or has no effect on this direction.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.extrapolate(optax.sgd(0.4), inner_learning_rate=0.2)
      >>> loss = lambda p: 0.5 * jnp.sum(p["w"] ** 2)
      >>> params = {"w": jnp.array([1.0])}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params['w'][0]:.2f}")  # w: 1, 0.6, 0.44; h: 1, 0.6 - 0.2, 0.44 - 0.2 * 0.4
      0.36
      >>> print(f"{lro.extrapolation_eval_params(params, state)['w'][0]:.2f}")
      0.44

    Reference:
      Lin et al., Extrapolation for Large-batch Training in Deep Learning, 2020,
      https://arxiv.org/abs/2006.05720; extrapolation from the past: Popov, 1980.
    """
    check_inner_learning_rate(inner_learning_rate)
    if direction != "normalized":
        refuse_unused(
            extrapolate,
            f"direction={direction!r}",
            weight_dimension_numbers=weight_dimension_numbers,
        )
    direction_of = direction_from(direction, max_norm, weight_dimension_numbers)
    inner = transformation("inner", inner)

    def init_fn(params: optax.Params) -> ExtrapolateState:
        zeros = optax.tree.zeros_like(params)
        return ExtrapolateState(jnp.zeros([], jnp.int32), zeros, inner.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        whole: Whole | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ExtrapolateState]:
        count = optax.safe_increment(state.count)
        rate = inner_learning_rate(count) if callable(inner_learning_rate) else inner_learning_rate
        # Number by number: to check whole arrays would cost a pass over them before all others.
        finite = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, jnp.zeros_like(g)), updates)
        ahead = direction_of(finite)
        scale = lambda zeta, old: (rate * zeta).astype(old.dtype)
        displacement = jax.tree.map(scale, ahead, state.displacement)
        previous, stored = state.displacement, displacement
        if not (whole is not None and whole.settled):  # a slice has copies of one slice anyway
            previous, stored = _both(state.count, previous, stored)
        weights = None if params is None else _added(params, previous)
        moves, inner_state = inner.update(updates, state.inner, weights, whole=whole, **extra_args)
        move = lambda g, u, old, new: (u + (to_float32(old) - to_float32(new))).astype(g.dtype)
        new = jax.tree.map(move, updates, moves, previous, displacement)
        return new, ExtrapolateState(count, stored, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def extrapolation_eval_params(params: optax.Params, state: optax.OptState) -> optax.Params:
    r"""The weights :math:`w = h + \hat\gamma g` of a run with `extrapolate`.

    Args:
      params: Parameters of the training loop, :math:`h`.
      state: Optimizer state with `extrapolate` at any depth: in a chain, under ``optax.masked``, or
        several times under ``optax.partition``.

    Returns:
      A tree like ``params``, with the same dtypes.

    Raises:
      ValueError: If there is no state of `extrapolate`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = optax.chain(optax.clip(1.0), lro.extrapolate(optax.sgd(0.1), 0.05))
      >>> params = {"w": jnp.ones(1)}
      >>> updates, state = tx.update({"w": jnp.full(1, 9.0)}, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> weights = lro.extrapolation_eval_params(params, state)
      >>> print(f"{params['w'][0]:.2f} {weights['w'][0]:.2f}")
      0.85 0.90

    Reference:
      Lin et al., 2020, https://arxiv.org/abs/2006.05720: the iterates are :math:`w`.
    """
    is_ours = lambda x: isinstance(x, ExtrapolateState)
    found = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    if not found:
        raise ValueError(
            "state has no ExtrapolateState: pass the state of an optimizer made with extrapolate, "
            f"not a {type(state).__name__}."
        )
    for each in found:
        params = _added(params, each.displacement)
    return params


@functools.partial(jax.jit, inline=True)  # outside of a jit it is compiled once
def _both(count: jax.Array, previous: Any, new: Any) -> tuple[Any, Any]:
    """Both trees unchanged, on a CPU such that not all of both are in memory at a time."""
    unchanged = lambda _, previous, new: (previous, new)
    return jax.lax.platform_dependent(count, previous, new, cpu=_leaf_by_leaf, default=unchanged)


def _leaf_by_leaf(count: jax.Array, previous: Any, new: Any) -> tuple[Any, Any]:
    """Both trees unchanged, for a CPU: each new leaf is written after the old one is copied.

    The update of the weights reads the previous displacement, whose memory stores the new one. XLA
    for CPU would copy all previous leaves first. Here each copy waits for the one before, so that
    all share the memory of one leaf. `one` is 1 and the predicates are true, which the compiler
    cannot infer.
    """
    one = (count >= 0).astype(jnp.int32)
    leaves, treedef = jax.tree.flatten(previous)
    copies, written = [], []
    for old, leaf in zip(leaves, treedef.flatten_up_to(new), strict=True):
        copy = lambda x, one: (x * one.astype(x.dtype), one * one)
        zeros = lambda *arrays: tuple(map(jnp.zeros_like, arrays))
        old, one = jax.lax.cond(one > 0, copy, zeros, old, one)
        copies.append(old)
        written.append(jnp.where(one > 0, leaf, jnp.zeros_like(leaf)))
    return treedef.unflatten(copies), treedef.unflatten(written)


def _added(params: Any, displacement: Any) -> Any:
    """The sum in the parameters' dtype; parameters that are masked out are unchanged."""
    is_hole = lambda x: isinstance(x, optax.MaskedNode)
    add = lambda d, p: p if is_hole(d) else (to_float32(p) + to_float32(d)).astype(p.dtype)
    return jax.tree.map(add, displacement, params, is_leaf=is_hole)
