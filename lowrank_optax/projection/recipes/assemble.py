"""What every recipe ends with: weight decay, the learning rate, and updates of the right dtype."""

from typing import Any

import optax

from lowrank_optax.quantization import Bits
from lowrank_optax.states import low_bit


def optimizer(
    projected: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any = 0.0,
    weight_decay_mask: Any = None,
    accumulate_steps: int | None = None,
    state_bits: Bits | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer from a projected transformation: decoupled decay, then the learning rate.

    While gradients accumulate, neither acts, and schedules count optimizer steps. With
    ``state_bits``, the moments of projected and other leaves alike are stored in so many.
    """
    if state_bits is not None and state_bits != 32:
        projected = low_bit(projected, state_bits)
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
    return keep_dtypes(optax.chain(projected, tail))


def keep_dtypes(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """``tx`` with updates of the gradients' dtype, also where a traced float32 rate promotes them.

    Under ``optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32)`` it would, for bfloat16
    parameters, in every part of optax that multiplies by a hyper-parameter.
    """

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        new, state = tx.update(updates, state, params, **extra_args)
        return optax.tree.cast_like(new, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)
