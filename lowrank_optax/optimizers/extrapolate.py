"""Extrapolation from the past as an optimizer: the parameters it moves are the points ahead."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.optimizers.lookahead import Direction, check_direction, direction_of
from lowrank_optax.states.arguments import refuse_unused, transformation
from lowrank_optax.states.precision import widened


class ExtrapolateState(NamedTuple):
    """State of `extrapolate`.

    Attributes:
      count: Number of updates so far, int32.
      displacement: The weights minus the parameters held, in the parameters' shapes and dtypes:
        the inner learning rate times the direction of the last gradient.
      inner: The state of the optimizer.
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
    r"""Any optimizer with its gradients taken ahead, for one worker, as a plain transformation.

    The weights :math:`w` move by the optimizer's updates :math:`u`; gradients are taken at
    :math:`h`, ahead of them along the last gradient:

    .. math::
      h_t = w_t - \hat\gamma_t g_{t-1}, \qquad g_t = \nabla f(h_t), \qquad w_{t+1} = w_t + u_t(g_t).

    The parameters of the training loop are :math:`h`, which moves by
    :math:`u_t + \hat\gamma_t g_{t-1} - \hat\gamma_{t+1} g_t`; evaluate, average and export
    ``extrapolation_eval_params(params, state)``, which is :math:`w`. The steps are those of
    `extrapolated_value_and_grad` with ``"past_global"``, where the loop holds :math:`w` (in
    bfloat16 prefer that: this form rounds :math:`h`). With ``optax.sgd`` it is optimistic gradient
    descent; the first step is plain, as if :math:`g_{-1}` were 0
    (``optax.optimistic_gradient_descent`` takes :math:`g_{-1} = g_0`).

    Args:
      inner: The optimizer; it sees :math:`w` as ``params``, and decays it.
      inner_learning_rate: :math:`\hat\gamma \ge 0`: a float, a traced scalar, or a schedule of the
        number of steps. Where it is 0, the steps are the optimizer's.
      direction: What stands for the last gradient in :math:`h`: see `extrapolated_value_and_grad`.
      max_norm: Largest norm of that direction; None for no bound.
      weight_dimension_numbers: Which leaves are matrices, for ``direction="normalized"``: see
        `scale_by_projection`.

    Returns:
      A transformation with the state `ExtrapolateState`: ``inner``'s, and one array of each
      parameter's shape. After a gradient that is not finite, that leaf is not extrapolated.

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
    check_direction(direction, max_norm, inner_learning_rate)
    if direction != "normalized":
        refuse_unused(
            extrapolate,
            f"direction={direction!r}",
            weight_dimension_numbers=weight_dimension_numbers,
        )
    inner = transformation("inner", inner)

    def init_fn(params: optax.Params) -> ExtrapolateState:
        zeros = optax.tree.zeros_like(params)
        return ExtrapolateState(jnp.zeros([], jnp.int32), zeros, inner.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ExtrapolateState]:
        count = optax.safe_increment(state.count)
        rate = inner_learning_rate(count) if callable(inner_learning_rate) else inner_learning_rate
        # Number by number: to ask a whole array would cost a pass over it before any other.
        finite = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, jnp.zeros_like(g)), updates)
        ahead = direction_of(finite, direction, max_norm, weight_dimension_numbers)
        scale = lambda zeta, old: (rate * zeta).astype(old.dtype)
        displacement = jax.tree.map(scale, ahead, state.displacement)
        previous, stored = _both(state.count, state.displacement, displacement)
        weights = None if params is None else _added(params, previous)
        moves, inner_state = inner.update(updates, state.inner, weights, **extra_args)
        move = lambda g, u, old, new: (u + (widened(old) - widened(new))).astype(g.dtype)
        new = jax.tree.map(move, updates, moves, previous, displacement)
        return new, ExtrapolateState(count, stored, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def extrapolation_eval_params(params: optax.Params, state: optax.OptState) -> optax.Params:
    r"""The weights of a run with `extrapolate`: what to evaluate, average and export.

    .. math:: w = h + \hat\gamma g

    Args:
      params: The parameters that the training loop holds, :math:`h`.
      state: The optimizer's state, in which `extrapolate` may be at any depth: in a chain, under
        ``optax.masked``, or several times under ``optax.partition``.

    Returns:
      A tree with the structure, shapes and dtypes of ``params``.

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
            "state has no ExtrapolateState: give the optimizer's state, of a transformation made "
            f"with extrapolate; this is a {type(state).__name__}."
        )
    for each in found:
        params = _added(params, each.displacement)
    return params


@functools.partial(jax.jit, inline=True)  # outside of a jit it is compiled once
def _both(count: jax.Array, previous: Any, new: Any) -> tuple[Any, Any]:
    """Return both trees unchanged, on a CPU such that not all of both are held at a time."""
    unchanged = lambda _, previous, new: (previous, new)
    return jax.lax.platform_dependent(count, previous, new, cpu=_leaf_by_leaf, default=unchanged)


def _leaf_by_leaf(count: jax.Array, previous: Any, new: Any) -> tuple[Any, Any]:
    """Return both trees unchanged, for a CPU: each new leaf is written after the old one is copied.

    The new displacement is stored in the memory of the previous one, which the weights' update
    reads. XLA for CPU copies all previous leaves first. Here each copy waits for the one before, so
    that all share the memory of one leaf. `one` is 1, which the compiler cannot infer.
    """
    one = (count >= 0).astype(jnp.int32)
    leaves, treedef = jax.tree.flatten(previous)
    copies, written = [], []
    for old, leaf in zip(leaves, treedef.flatten_up_to(new), strict=True):
        copy = lambda x, one: (x * one.astype(x.dtype), one * one)
        old, one = jax.lax.cond(one > 0, copy, _zeros, old, one)
        copies.append(old)
        written.append(jnp.where(one > 0, leaf, jnp.zeros_like(leaf)))
    return treedef.unflatten(copies), treedef.unflatten(written)


def _zeros(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros_like(x) for x in arrays)


def _added(params: Any, displacement: Any) -> Any:
    """The sum, rounded to the parameters' dtype; parameters that are masked out as they are."""
    is_hole = lambda x: isinstance(x, optax.MaskedNode)
    add = lambda d, p: p if is_hole(d) else (widened(p) + widened(d)).astype(p.dtype)
    return jax.tree.map(add, displacement, params, is_leaf=is_hole)
