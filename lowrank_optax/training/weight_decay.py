"""Weight decay with a choice of its coupling to the learning rate."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.states.precision import scalar_dtype, value_at

Coupling = Literal["adamw", "independent", "constant", "squared", "l2"]


class AddWeightDecayState(NamedTuple):
    """State of `add_weight_decay`.

    Attributes:
      count: Number of updates so far, int32.
      anchor: The initial parameters with ``anchor="initial"``, otherwise ``()``.
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
    r"""Weight decay with a choice of its coupling to the learning rate and of its anchor.

    Adds :math:`-\kappa_t (w - a)` to the final update, for the learning rate :math:`\eta_t` with
    peak :math:`\eta_{\max}`, the decay :math:`\lambda_t` and the anchor :math:`a`:

    - ``"adamw"``: :math:`\kappa_t = \eta_t \lambda_t`, as in optax and PyTorch;
    - ``"independent"``: :math:`\kappa_t = \lambda_t \eta_t / \eta_{\max}`, so that a new peak does
      not change the decay (Loshchilov & Hutter's own form);
    - ``"constant"``: :math:`\kappa_t = \lambda_t`;
    - ``"squared"``: :math:`\kappa_t = \lambda_t \eta_t^2 / \eta_{\max}`, which keeps the norm of
      normalized layers constant while :math:`\eta` falls (corrected decay);
    - ``"l2"``: :math:`\lambda_t (w - a)` is added to the gradient, before the preconditioner
      and momentum.

    In a chain it comes **after** ``optax.scale_by_learning_rate`` or a whole optimizer (with
    its own ``weight_decay=0``); only ``"l2"`` comes **first**.

    Args:
      weight_decay: A float :math:`\lambda`, or a schedule of it.
      coupling: One of the above.
      learning_rate: The optimizer's learning rate, a float or schedule. None: pass it to
        ``update(..., learning_rate=...)``. Not needed for ``"constant"`` and ``"l2"``.
      peak_learning_rate: Largest value of the schedule, for ``"independent"`` and ``"squared"``;
        not needed if the learning rate is a number.
      anchor: Value that weights decay towards: 0, another number (1 for the scales of norms), or
        ``"initial"``, the weights that ``init`` was given (for fine-tuning), which the state then
        holds a copy of.
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
      ...     lro.training.add_weight_decay(
      ...         0.1, "squared", learning_rate=rate, peak_learning_rate=1e-3,
      ...         mask=lro.training.decay_mask(),
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
    if coupling not in get_args(Coupling):
        raise ValueError(f"coupling={coupling!r} must be one of {get_args(Coupling)}.")
    peak = peak_learning_rate
    check_rate("weight_decay", weight_decay)
    check_rate("learning_rate", learning_rate)
    check_rate("peak_learning_rate", peak)
    if callable(peak):
        raise ValueError("peak_learning_rate must be a number, the largest that the schedule has.")
    if coupling in ("independent", "squared") and peak is None and callable(learning_rate):
        raise ValueError(
            f"coupling={coupling!r} with a schedule as learning_rate needs peak_learning_rate, "
            "the largest that the schedule has."
        )
    if isinstance(anchor, str) and anchor != "initial":
        raise ValueError(f"anchor={anchor!r} must be a number or 'initial'.")
    to_initial = isinstance(anchor, str)

    def init_fn(params: optax.Params) -> AddWeightDecayState:
        # Copies, because parameters may be donated to a step.
        copies = jax.tree.map(lambda p: jnp.array(p, copy=True), params) if to_initial else ()
        return AddWeightDecayState(jnp.zeros([], jnp.int32), copies)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AddWeightDecayState]:
        if params is None:
            raise ValueError("add_weight_decay needs params: call tx.update(grads, state, params).")
        dtype = scalar_dtype(updates)
        rate = learning_rate_at(learning_rate, state.count, extra_args, dtype)
        strength = value_at(weight_decay, state.count, dtype)
        step = -_shrinkage(coupling, strength, rate, learning_rate if peak is None else peak)

        def decay(update: jax.Array, weight: jax.Array, goal: Any) -> jax.Array:
            dtype = jnp.promote_types(update.dtype, jnp.float32)
            distance = weight.astype(dtype) - jnp.asarray(goal, dtype)
            return (update.astype(dtype) + step.astype(dtype) * distance).astype(update.dtype)

        goals = state.anchor if to_initial else jax.tree.map(lambda _: anchor, updates)
        new = jax.tree.map(decay, updates, params, goals)
        return new, AddWeightDecayState(optax.safe_increment(state.count), state.anchor)

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return tx if mask is None else optax.masked(tx, mask)


def _shrinkage(coupling: Coupling, strength: jax.Array, rate: Any, peak: Any) -> jax.Array:
    """The fraction of a weight that a step removes; for "l2" minus what the gradient gains."""
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
    # A rate that is always zero has no peak, and nothing decays.
    peak = rate if peak is None else jnp.asarray(peak, rate.dtype)
    share = jnp.where(peak == 0, 0.0, rate / jnp.where(peak == 0, 1.0, peak))
    return share * strength * (rate if coupling == "squared" else 1.0)


def learning_rate_at(
    learning_rate: optax.ScalarOrSchedule | None,
    count: jax.Array,
    extra_args: Mapping[str, Any],
    dtype: Any = jnp.float32,
) -> jax.Array | None:
    """The learning rate at a step: the argument, else that passed to ``update``, else None."""
    if learning_rate is None:
        learning_rate = extra_args.get("learning_rate")
    return None if learning_rate is None else value_at(learning_rate, count, dtype)


def check_rate(argument: str, value: Any) -> None:
    """Refuses a negative number; traced numbers and schedules are not checked."""
    if isinstance(value, int | float) and not value >= 0:
        raise ValueError(f"{argument}={value} must be at least 0.")
