"""What every recipe ends with: weight decay, the learning rate, and updates of the right dtype."""

from typing import Any

import optax

from lowrank_optax.quantization import Bits
from lowrank_optax.states.low_bit import low_bit
from lowrank_optax.states.precision import keep_dtypes


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
    if state_bits is not None and state_bits != 32:
        scaled = low_bit(scaled, state_bits)
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
