"""AFLoRA's freezing: factors stop for good, one by one, those with the smallest scores first."""

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
from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.paths import normalised_path, owner_of
from lowrank_optax.states.arguments import transformation

FreezingMode = Literal["quantile", "fraction"]


class AfloraFreezingState(NamedTuple):
    """State of `aflora_freezing`.

    Attributes:
      count: Number of updates so far, int32.
      size: How many numbers the matrices had when it was made, int32.
      frozen: Which matrices are frozen, bool: a scalar, or ``[L]`` of a stack; ``MaskedNode`` for
        leaves that are none of them. Likewise the next three.
      window_mean: Running mean of ``|g|`` in the present window, float32 like the leaf.
      sensitivity: Exponential average of the windows' means, float32.
      uncertainty: Exponential average of how far they were from that, float32.
      inner_state: Of the inner transformation.
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
    r"""``inner``, with the leaves named ``A`` and ``B`` frozen one by one until none moves.

    A matrix has a score, the mean over its elements of sensitivity times uncertainty: averages
    :math:`I \leftarrow \beta_1 I + (1 - \beta_1) w` and
    :math:`U \leftarrow \beta_2 U + (1 - \beta_2) |w - I|` of the mean :math:`w` of :math:`|g|` over
    windows of ten steps. What is still to be trained at step :math:`t` is

    .. math::
      \rho(t) = \Bigl(1 - \frac{t - t_i}{T - t_i - t_f}\Bigr)^3

    after :math:`t_i` steps of warm-up; the last :math:`t_f` train none. In mode ``"quantile"``, the
    official code's, a matrix is frozen when its score is below the :math:`1 - \rho` quantile of all
    elements of those that are left, which is much faster than :math:`\rho` falls; in ``"fraction"``
    the lowest-ranked are, such that no less than :math:`\rho` of all numbers is trained. Windows,
    and decisions but for the last, are ``window`` steps apart.

    A frozen matrix does not move from the deciding step on, neither by momentum nor decay; its
    gradient counts in no norm, and its moments in ``inner`` stay. Layers of a stack are frozen one
    by one. Put gradient clipping inside ``inner``: scores are of raw gradients. Gradients that are
    not finite do not get into them.

    That saves no time and no memory as such: `frozen_leaves` says what to take out of the trained
    parameters, and `carry_state` takes the optimizer's state along.

    Args:
      inner: Any optax transformation, with its learning rate and weight decay.
      total_steps: Optimizer steps of the run, :math:`T`.
      warmup_steps: Those before the first decision, :math:`t_i`: one epoch in the GLUE code, 0.3 T
        in the GSM8K code.
      final_steps: Those at the end with all frozen, :math:`t_f`: 0.7 T and 0.3 T there.
      exponent: Of the schedule: 3, in the GSM8K code 2.
      beta1: Decay of the sensitivity.
      beta2: Decay of the uncertainty.
      window: Steps of a window.
      mode: Which matrices are frozen.
      names: Last names of the leaves that are. A leaf's last two axes are those of a matrix.

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
    stops = below_quantile if mode == "quantile" else lowest_ranked

    def decide(
        scores: Scores, frozen: list[jax.Array], count: jax.Array, size: jax.Array
    ) -> list[jax.Array]:
        """What is frozen after the decision of this step, if there is one."""
        rho = remaining(count)

        def decision(frozen: list[jax.Array]) -> list[jax.Array]:
            found = stops(scores, frozen, rho, size)
            # At the end all are, also those whose scores tie, which are below no quantile.
            return [was | now | (rho <= 0) for was, now in zip(frozen, found, strict=True)]

        last = count > total_steps - final_steps
        due = (count > warmup_steps) & ((count % window == 0) | last)
        left = jnp.any(jnp.stack([jnp.any(~x) for x in frozen]))
        return jax.lax.cond(due & left, decision, lambda frozen: frozen, frozen)

    def init_fn(params: optax.Params) -> AfloraFreezingState:
        leaves, put = _chosen(params, names)
        zeros = lambda: put([_zeros_like(x) for x in leaves])
        return AfloraFreezingState(
            count=jnp.zeros([], jnp.int32),
            size=jnp.asarray(sum(x.size for x in leaves), jnp.int32),
            frozen=put([_flags_of(x) for x in leaves]),
            window_mean=zeros(),
            sensitivity=zeros(),
            uncertainty=zeros(),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AfloraFreezingState]:
        gradients, put = _chosen(updates, names)
        frozen = jax.tree.leaves(state.frozen)
        remembered = (state.window_mean, state.sensitivity, state.uncertainty)
        scores = Scores(*map(jax.tree.leaves, remembered))
        if gradients:
            scores = observe(gradients, scores, frozen, state.count % window, beta1, beta2)
            frozen = decide(scores, frozen, state.count, state.size)
        flags = put(frozen)
        new, inner_state = inner.update(
            _stopped(updates, flags), state.inner_state, params, **extra_args
        )
        return _stopped(new, flags), AfloraFreezingState(
            optax.safe_increment(state.count),
            state.size,
            flags,
            *map(put, scores),
            inner_state=_kept(state.inner_state, inner_state, updates, flags),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def aflora_schedule(
    total_steps: int, warmup_steps: int, final_steps: int, exponent: float = 3.0
) -> Callable[[Any], jax.Array]:
    r"""The fraction of AFLoRA's factors that is still to be trained at a step.

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
    steps = {"warmup_steps": warmup_steps, "final_steps": final_steps}
    for name, value in steps.items():
        _check_number(name, value, 0)
    _check_number("total_steps", total_steps, 1)
    known = all(isinstance(x, int | float) for x in (total_steps, *steps.values()))
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
    """The leaves that are matrices of these names, and what puts others in their places."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    is_one = lambda path, x: x.ndim > 1 and normalised_path(path)[-1:] in {(n,) for n in names}
    at = [i for i, (path, x) in enumerate(paths) if is_one(path, x)]

    def put(found: list[jax.Array]) -> Any:
        places: list[Any] = [optax.MaskedNode()] * len(paths)
        for i, x in zip(at, found, strict=True):
            places[i] = x
        return treedef.unflatten(places)

    return [paths[i][1] for i in at], put


def _flags_of(x: jax.Array) -> jax.Array:
    return explicit_sharding.zeros(x.shape[:-2], bool, explicit_sharding.partition_of_batch(x))


def _zeros_like(x: jax.Array) -> jax.Array:
    return explicit_sharding.zeros(x.shape, jnp.float32, explicit_sharding.partition_of(x))


def _stopped(tree: Any, flags: Any) -> Any:
    """A tree with zeros where flags are set."""
    leaves, treedef = jax.tree.flatten(tree)
    stop = lambda x, flag: x if _is_masked(flag) else jnp.where(over(flag, x), 0, x)
    return treedef.unflatten(list(map(stop, leaves, treedef.flatten_up_to(flags))))


def _kept(old: Any, new: Any, params: Any, flags: Any) -> Any:
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


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
