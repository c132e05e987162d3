"""Weight decay after the learning rate."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax.training import (
    add_weight_decay,
    decay_mask,
    monitor_weight_decay,
)
from lowrank_optax.training.weight_decay import Coupling
from tests.training.random_walks import SIZE, random_walk

RATE = optax.warmup_cosine_decay_schedule(0.0, 0.02, 5, 30)
PARAMS = {
    "norm": {"scale": np.ones(3, np.float32)},
    "up": {"kernel": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)},
}


def run(tx: optax.GradientTransformation, params: Any = PARAMS, **extra_args: Any) -> Any:
    """The parameters after 20 steps on fixed random gradients."""
    rng = np.random.default_rng(3)
    normal = lambda p: rng.normal(size=(20, *p.shape)).astype(p.dtype)

    def step(carry: Any, grads: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(grads, state, params, **extra_args)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads))
    return run(params, jax.tree.map(normal, params))[0][0]


def decayed(coupling: Coupling = "adamw", decay: Any = 0.3, **options: Any) -> Any:
    return run(optax.chain(optax.adam(RATE), add_weight_decay(decay, coupling, **options)))


@pytest.mark.parametrize("mask", [None, decay_mask(), {"norm": False, "up": True}])
def test_adamw_coupling_is_optax_adamw(mask: Any) -> None:
    expected = run(optax.adamw(RATE, weight_decay=0.3, mask=mask))
    assert_close(decayed(learning_rate=RATE, mask=mask), expected)


def test_a_schedule_of_the_decay_is_that_of_optax_adamw() -> None:
    decay = optax.linear_schedule(0.5, 0.0, 10)
    expected = run(optax.adamw(RATE, weight_decay=decay))
    assert_close(decayed(decay=decay, learning_rate=RATE), expected)


def test_independent_decay_at_a_constant_rate_is_adamw_with_the_product() -> None:
    rate, decay = 0.02, 0.3
    tail = add_weight_decay(rate * decay, "independent", learning_rate=rate)
    expected = run(optax.adamw(rate, weight_decay=decay))
    assert_close(run(optax.chain(optax.adam(rate), tail)), expected)


def test_the_policies_take_what_their_formulas_say() -> None:
    decay, peak = 0.3, 0.02
    shares = {
        "adamw": lambda rate: rate * decay,
        "independent": lambda rate: decay * rate / peak,
        "constant": lambda rate: decay,
        "squared": lambda rate: decay * rate**2 / peak,
    }
    for coupling, share in shares.items():
        tx = add_weight_decay(decay, coupling, learning_rate=RATE, peak_learning_rate=peak)
        state, zero = tx.init(PARAMS), jax.tree.map(np.zeros_like, PARAMS)
        update = jax.jit(tx.update)
        for step in range(8):
            updates, state = update(zero, state, PARAMS)
            expected = -share(float(RATE(step))) * np.asarray(PARAMS["up"]["kernel"])
            assert_close(updates["up"]["kernel"], expected, 100)


def test_l2_comes_before_the_preconditioner() -> None:
    expected = run(optax.chain(optax.add_decayed_weights(0.3), optax.adam(RATE)))
    assert_close(run(optax.chain(add_weight_decay(0.3, "l2"), optax.adam(RATE))), expected)


def test_the_learning_rate_may_come_as_an_extra_argument() -> None:
    tx = optax.chain(optax.adam(0.02), add_weight_decay(0.3))
    assert_close(run(tx, learning_rate=0.02), run(optax.adamw(0.02, weight_decay=0.3)))


@pytest.mark.full  # the formulas of both are compared above, step by step
def test_squared_keeps_the_norm_when_the_rate_is_halved_and_adamw_does_not() -> None:
    rate, decay, phase = 0.02, 0.2, 5000
    halved = optax.piecewise_constant_schedule(rate, {phase: 0.5})
    changes = {}
    for coupling in ("squared", "adamw"):
        tx = optax.chain(
            optax.adam(halved),
            add_weight_decay(decay, coupling, learning_rate=halved, peak_learning_rate=rate),
            monitor_weight_decay(learning_rate=halved),
        )
        history, _ = random_walk(tx, (rate * SIZE / 2 / decay) ** 0.5, 2 * phase)
        norms = np.asarray(history["all"]["weight_norm"])
        changes[coupling] = norms[-1500:].mean() / norms[phase - 1500 : phase].mean()
    # Norms are some two per cent below the limit of small decay, the less the smaller it is.
    assert changes["squared"] == pytest.approx(1.0, abs=0.025)
    assert changes["adamw"] == pytest.approx(0.5**0.5, abs=0.025)


def test_weights_decay_towards_where_they_started() -> None:
    tx = add_weight_decay(0.5, "constant", anchor="initial")
    moved = jax.tree.map(lambda p: p + 1.0, PARAMS)
    state, params = tx.init(PARAMS), moved
    zero = jax.tree.map(np.zeros_like, PARAMS)
    update = jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(zero, state, params)
        params = jax.tree.map(np.add, params, updates)
    assert_close(params, jax.tree.map(lambda p: p + 0.125, PARAMS))
    assert_close(state.anchor, PARAMS)


def test_scales_of_norms_decay_towards_one() -> None:
    tx = add_weight_decay(0.5, "constant", anchor=1.0, mask=decay_mask(("norms",)))
    params = {"norm": {"scale": jnp.full(3, 2.0)}, "up": {"kernel": jnp.full((2, 3), 2.0)}}
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_array_equal(updates["norm"]["scale"], -0.5)
    np.testing.assert_array_equal(updates["up"]["kernel"], 0.0)
    assert state.inner_state.anchor == ()  # a number costs nothing


def test_only_an_initial_anchor_costs_memory_and_only_where_it_decays() -> None:
    tx = add_weight_decay(0.1, "constant", anchor="initial", mask=decay_mask())
    anchor = tx.init(PARAMS).inner_state.anchor
    assert [x.shape for x in jax.tree.leaves(anchor)] == [(4, 3)]


def test_a_donated_parameter_does_not_take_the_anchor_with_it() -> None:
    params = {"kernel": jnp.ones((2, 2))}
    tx = add_weight_decay(0.5, "constant", anchor="initial")
    state = tx.init(params)
    params["kernel"].delete()
    np.testing.assert_array_equal(state.anchor["kernel"], 1.0)


def test_decay_is_computed_in_float32_and_updates_keep_their_dtype() -> None:
    params = {"kernel": jnp.full((4,), 0.369, jnp.bfloat16)}
    tx = add_weight_decay(0.1, learning_rate=1e-3)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert updates["kernel"].dtype == jnp.bfloat16
    weight = float(params["kernel"][0])
    assert float(updates["kernel"][0]) == float(jnp.bfloat16(-jnp.float32(1e-4) * weight))


def test_a_traced_rate_that_is_zero_gives_no_nan() -> None:
    tx = add_weight_decay(0.1, "squared")
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, learning_rate=jnp.float32(0.0))
    assert_close(updates, PARAMS)


def test_bad_arguments_are_named() -> None:
    for arguments, words in (
        ({"coupling": "linear"}, "coupling='linear'"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1"),
        ({"peak_learning_rate": RATE}, "peak_learning_rate must be a number"),
        ({"coupling": "squared", "learning_rate": RATE}, "needs peak_learning_rate"),
        ({"anchor": "last"}, "anchor='last'"),
    ):
        with pytest.raises(ValueError, match=words):
            add_weight_decay(**({"weight_decay": 0.1} | arguments))


def test_missing_parameters_and_rates_are_named() -> None:
    tx = add_weight_decay(0.1)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="needs the learning rate"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
