"""Weight decay after the learning rate: how much of a weight a step takes away."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.schedules.weight_decay.rates import check_rate, learning_rate_at
from lowrank_optax.states.precision import scalar_dtype, value_at

Coupling = Literal["adamw", "independent", "constant", "squared", "l2"]


class AddWeightDecayState(NamedTuple):
    """State of `add_weight_decay`.

    Attributes:
      count: Number of updates so far, int32.
      anchor: With ``anchor="initial"`` the first parameters, in their dtypes; otherwise ``()``.
    """

    count: Any
    anchor: Any


def add_weight_decay(
    weight_decay: optax.ScalarOrSchedule,
    coupling: Coupling = "adamw",
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    peak_learning_rate: Any = None,
    anchor: float | Literal["initial"] = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weight decay with a choice of how it follows the learning rate, and of where it leads.

    Adds :math:`-\kappa_t (w - a)` to the final update, for the learning rate :math:`\eta_t` with
    peak :math:`\eta_{\max}`, the decay :math:`\lambda_t` and the anchor :math:`a`:

    - ``"adamw"``: :math:`\kappa_t = \eta_t \lambda_t`, as in optax and PyTorch;
    - ``"independent"``: :math:`\kappa_t = \lambda_t \eta_t / \eta_{\max}`, so that a new peak does
      not change the decay (Loshchilov & Hutter's own form);
    - ``"constant"``: :math:`\kappa_t = \lambda_t`;
    - ``"squared"``: :math:`\kappa_t = \lambda_t \eta_t^2 / \eta_{\max}`, which keeps the norm of
      normalised layers where it is while :math:`\eta` falls (corrected decay);
    - ``"l2"``: :math:`\lambda_t (w - a)` is added to the gradient: decay that the preconditioner
      and momentum see, for comparison.

    The place in the chain: **after** ``optax.scale_by_learning_rate`` or a whole optimizer (with
    its own ``weight_decay=0``); ``"l2"`` alone comes **first**.

    Args:
      weight_decay: A float :math:`\lambda`, or a schedule of it.
      coupling: One of the above.
      learning_rate: The float or schedule that the optimizer has. None: it is passed to
        ``update(..., learning_rate=...)``. Not needed for ``"constant"`` and ``"l2"``.
      peak_learning_rate: The largest of a schedule, for ``"independent"`` and ``"squared"``; None
        for a learning rate that is a number.
      anchor: What weights decay towards: 0, another number (1 suits the scales of norms), or
        ``"initial"``, the weights that ``init`` was given (fine-tuning), of which the state then
        holds a copy.
      mask: Which leaves decay, as in ``optax.adamw``: see `decay_mask`.

    Returns:
      A transformation that needs ``params``, with the state `AddWeightDecayState` (inside
      ``optax.MaskedState`` with a mask). Arithmetic is in float32 (float64 of float64 updates),
      updates keep their dtype.

    Raises:
      ValueError: If an argument is out of range, the peak of a schedule is missing, or in
        ``update`` if ``params`` or the learning rate is.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> rate = optax.linear_schedule(1e-3, 0.0, 100)
      >>> tx = optax.chain(
      ...     optax.adam(rate),
      ...     lro.schedules.add_weight_decay(
      ...         0.1, "squared", learning_rate=rate, peak_learning_rate=1e-3,
      ...         mask=lro.schedules.decay_mask(),
      ...     ),
      ... )
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> updates, _ = tx.update({"kernel": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> print(f"{updates['kernel'][0, 0]:.6f}")
      -0.000100

    Reference:
      Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019,
      https://arxiv.org/abs/1711.05101; Kosson et al., Rotational Equilibrium, 2023,
      https://arxiv.org/abs/2305.17212; Defazio, Why Gradients Rapidly Increase Near the End of
      Training, 2025, https://arxiv.org/abs/2506.02285 ("squared").
    """
    _check(weight_decay, coupling, learning_rate, peak_learning_rate, anchor)
    keeps = isinstance(anchor, str)

    def init_fn(params: optax.Params) -> AddWeightDecayState:
        # Copies, because parameters may be donated to a step.
        kept = jax.tree.map(lambda p: jnp.array(p, copy=True), params) if keeps else ()
        return AddWeightDecayState(jnp.zeros([], jnp.int32), kept)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AddWeightDecayState]:
        if params is None:
            raise ValueError("add_weight_decay needs params: call tx.update(grads, state, params).")
        dtype = scalar_dtype(updates)
        rate = learning_rate_at(learning_rate, state.count, extra_args, dtype)
        strength = value_at(weight_decay, state.count, dtype)
        peak = learning_rate if peak_learning_rate is None else peak_learning_rate
        step = -_shrinkage(coupling, strength, rate, peak)
        leaves, treedef = jax.tree.flatten(updates)
        weights = treedef.flatten_up_to(params)
        goals = treedef.flatten_up_to(state.anchor) if keeps else [anchor] * len(leaves)
        new = [_decayed(*each, step) for each in zip(leaves, weights, goals, strict=True)]
        count = optax.safe_increment(state.count)
        return treedef.unflatten(new), AddWeightDecayState(count, state.anchor)

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return tx if mask is None else optax.masked(tx, mask)


def _shrinkage(coupling: Coupling, strength: jax.Array, rate: Any, peak: Any) -> jax.Array:
    """What a step takes of a weight, as a share of it; for "l2" the addition to the gradient."""
    if coupling == "l2":
        return -strength
    if coupling == "constant":
        return strength
    if rate is None:
        raise ValueError(
            f"add_weight_decay with coupling={coupling!r} needs the learning rate: give "
            "learning_rate, or call tx.update(..., learning_rate=...)."
        )
    if coupling == "adamw":
        return rate * strength
    # A rate of zero throughout has no peak, and decays nothing.
    peak = rate if peak is None else jnp.asarray(peak, rate.dtype)
    share = jnp.where(peak == 0, 0.0, rate / jnp.where(peak == 0, 1.0, peak))
    return share * strength * (rate if coupling == "squared" else 1.0)


def _decayed(update: jax.Array, weight: jax.Array, goal: Any, step: jax.Array) -> jax.Array:
    wide = jnp.promote_types(update.dtype, jnp.float32)
    distance = weight.astype(wide) - jnp.asarray(goal, wide)
    return (update.astype(wide) + step.astype(wide) * distance).astype(update.dtype)


def _check(weight_decay: Any, coupling: str, rate: Any, peak: Any, anchor: Any) -> None:
    if coupling not in get_args(Coupling):
        raise ValueError(f"coupling={coupling!r} must be one of {get_args(Coupling)}.")
    for name, value in (("weight_decay", weight_decay), ("learning_rate", rate)):
        check_rate(name, value)
    check_rate("peak_learning_rate", peak)
    if callable(peak):
        raise ValueError("peak_learning_rate must be a number, the largest that the schedule has.")
    if coupling in ("independent", "squared") and peak is None and callable(rate):
        raise ValueError(
            f"coupling={coupling!r} with a schedule as learning_rate needs peak_learning_rate, "
            "the largest that the schedule has."
        )
    if isinstance(anchor, str) and anchor != "initial":
        raise ValueError(f"anchor={anchor!r} must be a number or 'initial'.")
