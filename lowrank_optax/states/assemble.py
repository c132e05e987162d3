"""What every recipe ends with: weight decay, the learning rate, and updates of the right dtype."""

from typing import Any

import optax

from lowrank_optax.quantization import Bits
from lowrank_optax.states.low_bit import low_bit
from lowrank_optax.states.precision import keep_dtypes


def with_state_bits(
    tx: optax.GradientTransformationExtraArgs, state_bits: Bits | None
) -> optax.GradientTransformationExtraArgs:
    """``tx`` with its moments in so many bits between steps; None and 32 leave it as it is."""
    return tx if state_bits is None or state_bits == 32 else low_bit(tx, state_bits)


def optimizer(
    scaled: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any = 0.0,
    weight_decay_mask: Any = None,
    accumulate_steps: int | None = None,
    state_bits: Bits | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer from a `scale_by_...` transformation: decoupled decay, then the learning rate.

    While gradients accumulate, neither acts, and schedules count optimizer steps. With
    ``state_bits``, moments are stored in so many.
    """
    scaled = with_state_bits(scaled, state_bits)
    no_decay = isinstance(weight_decay, int | float) and weight_decay == 0
    tail = optax.chain(
        # An absent decay must not ask for parameters, and leaves the same (empty) state.
        optax.identity()
        if no_decay
        else optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    if accumulate_steps is not None and accumulate_steps > 1:
        emits = lambda step, **_: (step + 1) % accumulate_steps == 0
        tail = optax.transforms.conditionally_mask(tail, emits)
    return keep_dtypes(optax.chain(scaled, tail))
