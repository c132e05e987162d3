"""The end of every recipe: weight decay, the learning rate, and updates of the right dtype."""

from typing import Any, Literal, get_args

import optax

from lowrank_optax.quantization import Bits
from lowrank_optax.states.arguments import refuse_unused
from lowrank_optax.states.low_bit import low_bit
from lowrank_optax.states.precision import keep_dtypes

DecayPlacement = Literal["before_step", "after_step"]


def with_state_bits(
    tx: optax.GradientTransformationExtraArgs, state_bits: Bits | None
) -> optax.GradientTransformationExtraArgs:
    """``tx`` with ``state_bits`` per moment between steps; None and 32 leave it as it is."""
    return tx if state_bits is None or state_bits == 32 else low_bit(tx, state_bits)


def has_no_decay(weight_decay: Any) -> bool:
    """Whether weights never decay: False if the number is traced, or a schedule."""
    return isinstance(weight_decay, int | float) and weight_decay == 0


def optimizer(
    scaled: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any = 0.0,
    weight_decay_mask: Any = None,
    *,
    accumulate_steps: int | None = None,
    state_bits: Bits | None = None,
    decay_placement: DecayPlacement = "before_step",
) -> optax.GradientTransformationExtraArgs:
    """An optimizer from a `scale_by_...` transformation: decoupled decay, then the learning rate.

    While gradients accumulate, neither acts, and schedules count optimizer steps. Weights decay
    before the step, as in ``optax.adamw``, or after it.

    Raises:
      ValueError: If ``decay_placement`` is unknown, or if it or a mask is given without decay.
    """
    if decay_placement not in get_args(DecayPlacement):
        raise ValueError(
            f"decay_placement={decay_placement!r} must be 'before_step' or 'after_step'."
        )
    scaled = with_state_bits(scaled, state_bits)
    if has_no_decay(weight_decay):  # must not ask for parameters
        refuse_unused(
            optimizer,
            f"weight_decay={weight_decay}",
            weight_decay_mask=weight_decay_mask,
            decay_placement=decay_placement,
        )
        decay = optax.identity()
    else:
        decay = optax.add_decayed_weights(weight_decay, weight_decay_mask)
        if decay_placement == "after_step":
            # The step, less the share of it that decay after it takes.
            if callable(learning_rate) or callable(weight_decay):
                at = lambda value, count: value(count) if callable(value) else value
                left = lambda count: 1 - at(learning_rate, count) * at(weight_decay, count)
                shrunk = optax.scale_by_schedule(left)
            else:
                shrunk = optax.scale(1 - learning_rate * weight_decay)
            if weight_decay_mask is not None:
                shrunk = optax.masked(shrunk, weight_decay_mask)
            decay = optax.chain(shrunk, decay)
    tail = optax.chain(decay, optax.scale_by_learning_rate(learning_rate))
    if accumulate_steps is not None and accumulate_steps > 1:
        emits = lambda step, **_: (step + 1) % accumulate_steps == 0
        tail = optax.transforms.conditionally_mask(tail, emits)
    return keep_dtypes(optax.chain(scaled, tail))
