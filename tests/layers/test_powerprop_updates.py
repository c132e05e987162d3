"""Powerpropagation as a part of the optimizer equals what it does inside the loss."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

random = np.random.default_rng(0)
PARAMS = {
    "kernel": jnp.asarray(random.normal(size=(4, 3)), jnp.float32),
    "bias": jnp.asarray(random.normal(size=3), jnp.float32),
}
X = jnp.asarray(random.normal(size=(16, 4)), jnp.float32)
Y = jnp.asarray(random.normal(size=(16, 3)), jnp.float32)


def loss(params: Any) -> jax.Array:
    return jnp.mean((X @ params["kernel"] + params["bias"] - Y) ** 2)


def trajectory(tx: optax.GradientTransformation, loss: Any, params: Any, steps: int = 30) -> Any:
    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0][0])((params, tx.init(params)))


@pytest.mark.parametrize(
    "inner",
    [optax.sgd(0.1, momentum=0.9), optax.adamw(0.02, weight_decay=0.1)],
    ids=["momentum", "adamw"],
)
@pytest.mark.parametrize("alpha", [1.375, 2.0, 3.0])
def test_plain_is_training_inside_the_loss(
    inner: optax.GradientTransformation, alpha: float
) -> None:
    theta = lro.layers.powerprop_inverse(PARAMS, alpha)
    theta = trajectory(inner, lambda t: loss(lro.layers.powerprop(t, alpha)), theta)
    weights = trajectory(lro.layers.powerprop_updates(inner, alpha, "plain"), loss, PARAMS)
    assert_close(weights, lro.layers.powerprop(theta, alpha), 8000)


@pytest.mark.parametrize("alpha", [1.375, 2.0, 3.0])
def test_weight_space_takes_the_direction_from_gradients_of_weights(alpha: float) -> None:
    direction = optax.scale_by_adam()
    weights, state = PARAMS, direction.init(PARAMS)
    for _ in range(5):
        u, state = direction.update(jax.grad(loss)(weights), state)
        w, u_w = np.asarray(weights["kernel"], np.float64), np.asarray(u["kernel"], np.float64)
        theta = np.sign(w) * np.abs(w) ** (1 / alpha)
        theta = theta - 0.02 * alpha * np.abs(theta) ** (alpha - 1) * u_w
        kernel = np.sign(theta) * np.abs(theta) ** alpha
        weights = {
            "kernel": jnp.asarray(kernel, jnp.float32),
            "bias": weights["bias"] - 0.02 * u["bias"],
        }
    tx = lro.layers.powerprop_updates(optax.adam(0.02), alpha, "weight_space")
    assert_close(trajectory(tx, loss, PARAMS, 5), weights, 800)


def step_of(tx: optax.GradientTransformation, w: Any, g: Any) -> np.ndarray:
    params = {"kernel": jnp.asarray(w, jnp.float64)}
    updates, _ = tx.update({"kernel": jnp.asarray(g, jnp.float64)}, tx.init(params), params)
    return np.asarray(updates["kernel"])


def test_small_steps_move_weights_by_their_powers() -> None:
    w, g, rate, alpha = np.array([[0.3, -0.02, 1.5]]), np.array([[1.7, -0.3, 0.2]]), 1e-7, 2.5
    full, half = alpha**2 * np.abs(w) ** (2 - 2 / alpha), alpha * np.abs(w) ** (1 - 1 / alpha)
    with jax.enable_x64(True):
        sgd = step_of(lro.layers.powerprop_updates(optax.sgd(rate), alpha), w, g) / rate
        adam = optax.adam(rate, eps=0)
        weight_space = step_of(lro.layers.powerprop_updates(adam, alpha), w, g) / rate
        plain = step_of(lro.layers.powerprop_updates(adam, alpha, "plain"), w, g) / rate
    assert_close(sgd, -full * g, 800)
    assert abs(sgd[0, 0] + 2.5054) < 1e-3
    assert_close(weight_space, -full * np.sign(g), 800)
    assert_close(plain, -half * np.sign(g), 800)


@pytest.mark.parametrize(
    ("inner", "mode"),
    [
        (optax.sgd(0.1, momentum=0.9), "plain"),
        (optax.adam(0.1), "weight_space"),
        (optax.rmsprop(0.1), "weight_space"),
        (lro.low_bit(optax.adam(0.1), block_size=4, min_size=1), "weight_space"),
        (
            optax.partition({"a": optax.adam(0.1)}, lambda p: jax.tree.map(lambda _: "a", p)),
            "weight_space",
        ),
    ],
)
def test_the_mode_is_weight_space_for_optimizers_with_averages_of_squares(
    inner: optax.GradientTransformation, mode: Any
) -> None:
    by_rule = lro.layers.powerprop_updates(inner, 2.0)
    named = lro.layers.powerprop_updates(inner, 2.0, mode)
    other = {"plain": "weight_space", "weight_space": "plain"}[mode]
    opposite = lro.layers.powerprop_updates(inner, 2.0, other)
    ends = [trajectory(tx, loss, PARAMS, 3) for tx in (by_rule, named, opposite)]
    jax.tree.map(np.testing.assert_array_equal, ends[0], ends[1])
    assert not np.allclose(ends[0]["kernel"], ends[2]["kernel"])


def test_decay_of_the_inner_optimizer_takes_its_power_to_the_weights() -> None:
    tx = lro.layers.powerprop_updates(optax.adamw(0.1, weight_decay=0.5), 3.0, "plain")
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    new = optax.apply_updates(PARAMS, updates)
    assert_close(new["kernel"], 0.95**3 * PARAMS["kernel"], 100)
    assert_close(new["bias"], 0.95 * PARAMS["bias"], 100)


def test_no_gradient_is_no_update_and_zero_weights_stay() -> None:
    kernel = PARAMS["kernel"].at[1].set(0.0)
    params = {**PARAMS, "kernel": kernel}
    for inner in (optax.sgd(0.1), optax.adam(0.1)):
        tx = lro.layers.powerprop_updates(inner, 1.7)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        end = trajectory(tx, loss, params)["kernel"]
        np.testing.assert_array_equal(end[1], 0.0)
        assert (end[0] != kernel[0]).all()


def test_exponent_one_is_the_inner_optimizer_to_the_last_bit() -> None:
    inner = optax.adamw(0.02)
    tx = lro.layers.powerprop_updates(inner, 1)
    jax.tree.map(
        np.testing.assert_array_equal,
        trajectory(tx, loss, PARAMS),
        trajectory(inner, loss, PARAMS),
    )


def test_a_schedule_sets_the_exponent_while_the_function_stays() -> None:
    factory = optax.inject_hyperparams(
        lro.layers.powerprop_updates,
        static_args=("inner", "mode", "where"),
        hyperparam_dtype=jnp.float32,
    )
    tx = factory(optax.adam(0.02), alpha=optax.linear_schedule(1.0, 2.0, 20))
    state = tx.init(PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(zeros, state, PARAMS)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert abs(float(state.hyperparams["alpha"]) - 1.1) < 1e-6
    assert loss(trajectory(tx, loss, PARAMS, 300)) < loss(PARAMS) / 2


def test_bfloat16_weights_train_with_state_in_float32() -> None:
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = lro.layers.powerprop_updates(optax.sgd(0.01, momentum=0.9), 2.0)
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.1), params)
    updates, _ = tx.update(gradients, state, params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), (gradients, params))
    exact, _ = tx.update(wide[0], state, wide[1])
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(exact), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, y.astype(jnp.bfloat16))


def test_it_needs_parameters_and_a_known_mode() -> None:
    tx = lro.layers.powerprop_updates(optax.sgd(0.1), 2.0)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="mode='adaptive'"):
        lro.layers.powerprop_updates(optax.sgd(0.1), 2.0, "adaptive")  # type: ignore[arg-type]
