"""Decay that rounding loses, and the monitor that says so."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.training import measurements, monitor_weight_decay


def measured(params: Any, updates: Any) -> dict[str, Any]:
    """The numbers of all parameters."""
    tx = monitor_weight_decay()
    step = jax.jit(lambda updates, params: tx.update(updates, tx.init(params), params)[1])
    return measurements(step(updates, params))["all"]


def decayed_in(dtype: Any, wrap: Any = lambda tx: tx) -> Any:
    """0.37 after 1000 steps of nothing but decay, and the last measurement."""
    params = {"kernel": np.full((8, 4), 0.37, dtype)}
    monitor = monitor_weight_decay(learning_rate=1e-3, weight_decay=0.1)
    tx = optax.chain(wrap(optax.adamw(1e-3, weight_decay=0.1)), monitor)
    zero = jax.tree.map(jnp.zeros_like, params)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = tx.update(zero, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), None, 1000)[0])
    params, state = run(params)
    return params["kernel"].astype(jnp.float32), measurements(state)["matrices"]


@pytest.mark.parametrize("wrap", [lambda tx: tx, lro.in_float32])
def test_bfloat16_loses_all_of_its_decay_and_the_monitor_says_so(wrap: Any) -> None:
    weights, numbers = decayed_in(jnp.bfloat16, wrap)
    np.testing.assert_array_equal(weights, np.float32(0.369140625))
    assert numbers["rounding_loss"] == 1.0
    assert numbers["decay_lost"] == pytest.approx(1.0, rel=1e-5)
    assert numbers["decay_share"] == pytest.approx(1.0, rel=1e-2)


def test_float32_and_stochastic_rounding_lose_nothing() -> None:
    weights, numbers = decayed_in(jnp.float32)
    np.testing.assert_allclose(weights, 0.37 * 0.9048, rtol=1e-3)
    assert numbers["rounding_loss"] == numbers["decay_lost"] == 0.0
    rounded = lambda tx: optax.chain(lro.in_float32(tx), lro.round_updates("compensated"))
    weights, numbers = decayed_in(jnp.bfloat16, rounded)
    np.testing.assert_allclose(weights, 0.369140625 * 0.9048, rtol=2**-8)
    assert numbers["rounding_loss"] == numbers["decay_lost"] == 0.0


def test_the_share_of_the_decay_lost_is_that_of_large_weights() -> None:
    params = {"kernel": jnp.asarray([[3.0, 1e-3], [1e-3, 0.0]], jnp.bfloat16)}
    updates = {"kernel": jnp.asarray([[1e-3, 1e-3], [0.0, 1e-3]], jnp.bfloat16)}
    numbers = measured(params, updates)
    assert numbers["rounding_loss"] == 0.25
    assert numbers["decay_lost"] == pytest.approx(1.0, abs=1e-5)


def test_float16_is_rounded_as_float16() -> None:
    params = {"kernel": jnp.full((2, 2), 1.0, jnp.float16)}
    for size, lost in ((2.0**-12, 1.0), (2.0**-10, 0.0)):
        updates = {"kernel": jnp.full((2, 2), size, jnp.float16)}
        assert measured(params, updates)["rounding_loss"] == lost
