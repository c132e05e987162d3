"""Outside of a jit an update compiles nothing once its shapes have been seen."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro

RANK = {"rank": 2, "weight_dimension_numbers": lro.WeightDimensionNumbers(-2, -1)}
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "galore": lambda: lro.galore(1e-3, **RANK),
    "low_bit": lambda: lro.low_bit(lro.galore(1e-3, basis_bits=8, **RANK), min_size=0),
    "apollo": lambda: lro.apollo(1e-3, **RANK),
    "fira": lambda: lro.fira(1e-3, **RANK),
    "ldadam": lambda: lro.ldadam(1e-3, **RANK),
    "online_subspace_descent": lambda: lro.online_subspace_descent(1e-3, **RANK),
    "adarankgrad": lambda: lro.adarankgrad(1e-3, **RANK),
    "dct_adamw": lambda: lro.dct_adamw(1e-3, **RANK),
    "nag_gs": lambda: lro.nag_gs(1e-3),
    "grams": lambda: lro.grams(1e-3),
    "cautious_adamw": lambda: lro.cautious_adamw(1e-3),
    "extrapolate": lambda: lro.extrapolate(optax.adamw(1e-3), 1e-3),
    "fused_adamw": lambda: lro.fused_adamw(1e-3, min_size=0),
}


@pytest.mark.distinct
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_third_step_compiles_nothing(name: str) -> None:
    tx = OPTIMIZERS[name]()
    params = {"stack": jnp.ones((2, 8, 12)), "kernel": jnp.ones((8, 6)), "bias": jnp.ones(4)}
    gradients = jax.tree.map(lambda x: 0.1 * x, params)
    compiled: list[str] = []
    seen = lambda event, *_, **__: "backend_compile" in event and compiled.append(event)
    state = tx.init(params)
    step = tx.step if hasattr(tx, "step") else tx.update
    for _ in range(2):
        _, state = step(gradients, state, params)
    jax.monitoring.register_event_duration_secs_listener(seen)
    try:
        step(gradients, state, params)
    finally:
        jax.monitoring.unregister_event_duration_listener(seen)
    assert not compiled
