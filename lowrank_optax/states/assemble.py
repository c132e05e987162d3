"""What recipes share: Adam as official codes have it, decay, learning rate, bits and dtypes."""

import numbers
from typing import Any, Literal, get_args

import jax.numpy as jnp
import optax

from lowrank_optax.quantization import Bits
from lowrank_optax.states.arguments import refuse_unused
from lowrank_optax.states.low_bit import low_bit
from lowrank_optax.states.precision import keep_dtypes

EpsPlacement = Literal["before_bias_correction", "after_bias_correction"]


def scale_by_adam(
    b1: float,
    b2: float,
    eps: float,
    eps_placement: EpsPlacement = "after_bias_correction",
    bias_correction: bool = True,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Adam's scaling as in optax, or with ``eps`` added before bias correction.

    The first is ``optax.scale_by_adam``. The second is
    :math:`m \sqrt{1 - b_2^t} / (1 - b_1^t) / (\sqrt v + \epsilon)`, as in Hugging Face's AdamW and
    the official codes that follow it. ``bias_correction=False`` leaves out the factors of
    :math:`b_1^t` and :math:`b_2^t`. The state is that of optax.

    Raises:
      ValueError: If ``eps_placement`` is unknown, or ``b1`` or ``b2`` not in [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_adam(0.9, 0.999, 1e-3, "before_bias_correction")
      >>> one = jnp.ones(1)
      >>> print(tx.update(one, tx.init(one))[0].round(4))  # eps acts as 0.0316 would after it
      [0.9693]
    """
    if eps_placement not in get_args(EpsPlacement):
        raise ValueError(
            f"eps_placement={eps_placement!r} must be 'before_bias_correction' or "
            "'after_bias_correction'."
        )
    for name, decay in {"b1": b1, "b2": b2}.items():
        if isinstance(decay, numbers.Real) and not 0 <= decay < 1:
            raise ValueError(f"{name}={decay!r} must be at least 0 and below 1.")
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
    if bias_correction and eps_placement == "after_bias_correction":
        return adam

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        count = optax.safe_increment(state.count)
        # A float: outside of a jit each power to a whole number would be compiled.
        steps = jnp.asarray(count, jnp.result_type(float))
        root = jnp.sqrt(1 - b2**steps)
        # sqrt(v) + eps, over the root, is the corrected second moment's root plus this eps.
        step = optax.scale_by_adam(b1, b2, eps / root, mu_dtype=mu_dtype)
        new, state = step.update(updates, state, params)
        if not bias_correction:
            new = optax.tree.scale((1 - b1**steps) / root, new)
        return new, state

    return optax.GradientTransformation(adam.init, update_fn)


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
