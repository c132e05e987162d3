"""AFLoRA's freezing: factors are frozen one by one, those with the smallest scores first."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.adapters.training.aflora_scores import (
    Scores,
    below_quantile,
    lowest_ranked,
    observe,
    over,
)
from lowrank_optax.matrices.explicit_sharding import partition_of, partition_of_batch, zeros
from lowrank_optax.matrices.paths import normalised_path, owner_of
from lowrank_optax.states.arguments import transformation

FreezingMode = Literal["quantile", "fraction"]


class AfloraFreezingState(NamedTuple):
    """State of `aflora_freezing`.

    Attributes:
      count: Number of updates so far, int32.
      size: Number of elements of the matrices when it was made, int32.
      frozen: Which matrices are frozen, bool: a scalar, or ``[L]`` for a stack; ``MaskedNode`` for
        other leaves. Likewise the next three, float32 in the leaf's shape.
      window_mean: Running mean of ``|g|`` in the present window.
      sensitivity: Exponential average of the windows' means.
      uncertainty: Exponential average of their distance from it.
      inner_state: State of the inner transformation.
    """

    count: Any
    size: Any
    frozen: Any
    window_mean: Any
    sensitivity: Any
    uncertainty: Any
    inner_state: Any


def aflora_freezing(
    inner: optax.GradientTransformation,
    total_steps: int,
    warmup_steps: int,
    final_steps: int,
    *,
    exponent: float = 3.0,
    beta1: float = 0.85,
    beta2: float = 0.95,
    window: int = 10,
    mode: FreezingMode = "quantile",
    names: Sequence[str] = ("A", "B"),
) -> optax.GradientTransformationExtraArgs:
    r"""``inner``, with the leaves named ``A`` and ``B`` frozen one by one until all are.

    A matrix has a score, the mean over its elements of sensitivity times uncertainty: averages
    :math:`I \leftarrow \beta_1 I + (1 - \beta_1) w` and
    :math:`U \leftarrow \beta_2 U + (1 - \beta_2) |w - I|` of the mean :math:`w` of :math:`|g|` over
    windows of ten steps. The fraction that is still trained at step :math:`t` is

    .. math::
      \rho(t) = \Bigl(1 - \frac{t - t_i}{T - t_i - t_f}\Bigr)^3

    after :math:`t_i` steps of warm-up; in the last :math:`t_f` all are frozen. In mode
    ``"quantile"``, the official code's, a matrix is frozen when its score is below the
    :math:`1 - \rho` quantile of all elements of the matrices that are left, which is much faster
    than :math:`\rho` falls; in ``"fraction"`` those of the lowest scores are frozen, such that at
    least :math:`\rho` of all numbers is trained. Windows, and all decisions but the last, are
    ``window`` steps apart.

    A frozen matrix does not move from the deciding step on, neither by momentum nor decay; its
    gradient counts in no norm, and its moments in ``inner`` stay. Layers of a stack are frozen one
    by one. Put gradient clipping inside ``inner``: scores are of raw gradients, without those that
    are not finite.

    Freezing alone saves no time and no memory: `frozen_leaves` says what to take out of the trained
    parameters, and `carry_state` takes the optimizer's state along.

    Args:
      inner: Any optax transformation, with its learning rate and weight decay.
      total_steps: Optimizer steps of the run, :math:`T`.
      warmup_steps: Those before the first decision, :math:`t_i`: one epoch in the GLUE code, 0.3 T
        in the GSM8K code.
      final_steps: Those at the end with all frozen, :math:`t_f`: 0.7 T and 0.3 T there.
      exponent: Exponent of the schedule: 3, in the GSM8K code 2.
      beta1: Decay of the sensitivity.
      beta2: Decay of the uncertainty.
      window: Steps of a window.
      mode: Rule for the matrices to freeze.
      names: Last names of the leaves to freeze. A leaf's last two axes are those of a matrix.

    Returns:
      A transformation with the state `AfloraFreezingState`.

    Raises:
      ValueError: If an option is out of its range, or ``warmup_steps + final_steps`` more than
        ``total_steps``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> gradient = {"up": {"A": jnp.array([[1.0, 0.1]])}, "down": {"A": jnp.array([[2.0, 2.0]])}}
      >>> tx = lro.adapters.aflora_freezing(optax.sgd(0.1), 100, warmup_steps=10, final_steps=60)
      >>> state, update = tx.init(gradient), jax.jit(tx.update)
      >>> while not state.frozen["up"]["A"]:
      ...     updates, state = update(gradient, state)
      >>> print(state.count, updates["up"]["A"], updates["down"]["A"])
      21 [[0. 0.]] [[-0.2 -0.2]]

    Reference:
      Liu et al., AFLoRA, 2024, https://arxiv.org/abs/2403.13269, and its code,
      https://github.com/zeyuliu1037/AFLoRA (``glue/utils.py``).
    """
    remaining = aflora_schedule(total_steps, warmup_steps, final_steps, exponent)
    _check_number("window", window, 1)
    if mode not in get_args(FreezingMode):
        raise ValueError(f"mode={mode!r} must be one of {get_args(FreezingMode)}.")
    if isinstance(names, str):
        raise ValueError(f"names={names!r} must be a sequence of names, for example ('A', 'B').")
    inner = transformation("inner", inner)

    def decide(scores: Scores, frozen: list[jax.Array], state: Any) -> list[jax.Array]:
        """What is frozen after the decision of this step, if there is one."""
        rho, count = remaining(state.count), state.count

        def decision(frozen: list[jax.Array]) -> list[jax.Array]:
            if mode == "quantile":
                found = below_quantile(scores, frozen, rho)
            else:
                found = lowest_ranked(scores, frozen, rho, state.size)
            # At the end all are, also those whose scores tie, which are below no quantile.
            return [was | now | (rho <= 0) for was, now in zip(frozen, found, strict=True)]

        last = count > total_steps - final_steps
        decides = (count > warmup_steps) & ((count % window == 0) | last)
        left = jnp.any(jnp.stack([jnp.any(~x) for x in frozen]))
        return jax.lax.cond(decides & left, decision, lambda frozen: frozen, frozen)

    def init_fn(params: optax.Params) -> AfloraFreezingState:
        leaves, put = _chosen(params, names)
        flags = [zeros(x.shape[:-2], bool, partition_of_batch(x)) for x in leaves]
        start = lambda: put([zeros(x.shape, jnp.float32, partition_of(x)) for x in leaves])
        size = jnp.asarray(sum(x.size for x in leaves), jnp.int32)
        scores, count = (start(), start(), start()), jnp.zeros([], jnp.int32)
        return AfloraFreezingState(count, size, put(flags), *scores, inner_state=inner.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AfloraFreezingState]:
        gradients, put = _chosen(updates, names)
        frozen = jax.tree.leaves(state.frozen)
        remembered = (state.window_mean, state.sensitivity, state.uncertainty)
        scores = Scores(*map(jax.tree.leaves, remembered))
        if gradients:
            scores = observe(gradients, scores, frozen, state.count % window, beta1, beta2)
            frozen = decide(scores, frozen, state)
        flags = put(frozen)
        new, inner_state = inner.update(
            _stopped(updates, flags), state.inner_state, params, **extra_args
        )
        return _stopped(new, flags), AfloraFreezingState(
            optax.safe_increment(state.count),
            state.size,
            flags,
            *map(put, scores),
            inner_state=_frozen_state(state.inner_state, inner_state, updates, flags),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def aflora_schedule(
    total_steps: int, warmup_steps: int, final_steps: int, exponent: float = 3.0
) -> Callable[[Any], jax.Array]:
    r"""The fraction of AFLoRA's factors that is still trained at a step.

    .. math::
      \rho(t) = \begin{cases}
        1 & t \le t_i \\
        \bigl(1 - (t - t_i) / (T - t_i - t_f)\bigr)^p & t_i < t \le T - t_f \\
        0 & t > T - t_f
      \end{cases}

    Args:
      total_steps: :math:`T`.
      warmup_steps: :math:`t_i`.
      final_steps: :math:`t_f`.
      exponent: :math:`p`.

    Returns:
      A schedule, float32.

    Raises:
      ValueError: If a number is out of its range, or ``warmup_steps + final_steps`` more than
        ``total_steps``.

    Example:
      >>> import lowrank_optax as lro
      >>> rho = lro.adapters.aflora_schedule(1000, warmup_steps=50, final_steps=700)
      >>> print([f"{rho(t):.3f}" for t in (50, 60, 100, 200, 301)])
      ['1.000', '0.885', '0.512', '0.064', '0.000']

    Reference:
      Liu et al., AFLoRA, 2024, https://arxiv.org/abs/2403.13269.
    """
    _check_number("warmup_steps", warmup_steps, 0)
    _check_number("final_steps", final_steps, 0)
    _check_number("total_steps", total_steps, 1)
    known = all(isinstance(x, int | float) for x in (total_steps, warmup_steps, final_steps))
    if known and warmup_steps + final_steps > total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} and final_steps={final_steps} are more than "
            f"total_steps={total_steps}."
        )

    def schedule(count: Any) -> jax.Array:
        length = jnp.maximum(total_steps - warmup_steps - final_steps, 1)
        passed = jnp.clip((count - warmup_steps) / length, 0, 1)
        rho = jnp.where(count > total_steps - final_steps, 0.0, (1 - passed) ** exponent)
        return rho.astype(jnp.float32)

    return schedule


def _check_number(name: str, value: Any, least: int) -> None:
    if isinstance(value, int | float) and value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")


def _chosen(
    tree: Any, names: Sequence[str]
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """The leaves that are matrices of these names, and a function that puts others there."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    last = lambda path: normalised_path(path)[-1:]
    chosen = [x.ndim > 1 and last(path) in {(name,) for name in names} for path, x in paths]

    def put(found: list[jax.Array]) -> Any:
        new = iter(found)
        return treedef.unflatten([next(new) if there else optax.MaskedNode() for there in chosen])

    return [x for (_, x), there in zip(paths, chosen, strict=True) if there], put


def _stopped(tree: Any, flags: Any) -> Any:
    """A tree with zeros where flags are set."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    stop = lambda flag, x: x if is_masked(flag) else jnp.where(over(flag, x), 0, x)
    return jax.tree.map(stop, flags, tree, is_leaf=is_masked)


def _frozen_state(old: Any, new: Any, params: Any, flags: Any) -> Any:
    """The new state, with the old one's arrays of what is frozen."""
    owners: dict[tuple[str, ...], Any] = {
        normalised_path(path): None for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    owners |= {normalised_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(flags)}

    def keep(path: Any, now: jax.Array, was: jax.Array) -> jax.Array:
        owner = owner_of(path, owners)
        flag = None if owner is None else owners[owner]
        return now if flag is None else jnp.where(over(flag, now), was, now)

    return jax.tree_util.tree_map_with_path(keep, new, old)
