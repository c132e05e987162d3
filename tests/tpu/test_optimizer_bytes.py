"""Bytes that the TPU compiler has each optimizer's step move, against AdamW's."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro

pytestmark = pytest.mark.slow

PARAMS = {f"kernel_{i}": jax.ShapeDtypeStruct((2048, 8192), jnp.float32) for i in range(2)}
ONE_ARRAY = 2048 * 8192 * 4
RATE = 1e-3


def accessed(compile_for: Any, tx: optax.GradientTransformation) -> tuple[float, int]:
    """Bytes read and written by a step with donated weights and state, and of temporaries."""
    state = jax.eval_shape(tx.init, PARAMS)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = compile_for("v5e", step, PARAMS, state, PARAMS, donate_argnums=(0, 1))
    return compiled.cost_analysis()["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes


def test_no_optimizer_moves_more_bytes_than_it_has_to(compile_for: Any) -> None:
    """The compiler counts 9 arrays for AdamW, which reads 4 and writes 3; so for the others."""
    monitored = optax.chain(
        optax.adamw(RATE),
        lro.training.monitor_weight_decay(learning_rate=RATE, weight_decay=1e-4),
    )
    optimizers = {
        "nag_gs": (lro.nag_gs(RATE), 7),
        "adagrad_norm": (lro.adagrad_norm(RATE), 6),
        "grams": (lro.grams(RATE), 9),
        "with_gradient_direction(adamw)": (lro.with_gradient_direction(optax.adamw(RATE)), 9),
        "powerprop_updates(adamw)": (lro.layers.powerprop_updates(optax.adamw(RATE), 2.0), 9),
        "one_cycle(adamw)": (lro.training.one_cycle(optax.adamw, 1000, RATE), 9),
        "extrapolate(adamw)": (lro.extrapolate(optax.adamw(RATE), RATE), 11),
        "cautious_adamw, not rescaled": (lro.cautious_adamw(RATE, scale="none"), 9),
        # The share of elements that is kept must be known before the first of them moves.
        "cautious_adamw": (lro.cautious_adamw(RATE), 12),
        # Sums over updates, which the compiler makes anew rather than keep.
        "monitor_weight_decay": (monitored, 13),
    }
    of_adamw, _ = accessed(compile_for, optax.adamw(RATE))
    over = {}
    for name, (tx, arrays) in optimizers.items():
        moved, temporary = accessed(compile_for, tx)
        print(f"{name}: {moved / of_adamw:.3f} of AdamW's bytes")
        if moved > 1.01 * arrays / 9 * of_adamw or temporary > ONE_ARRAY / 8:
            over[name] = 9 * moved / of_adamw, temporary
    assert not over
