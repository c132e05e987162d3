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
normal = lambda *shape: np.float32(random.normal(size=shape))
PARAMS = {"kernel": normal(4, 3), "bias": normal(3)}
X, Y = normal(16, 4), normal(16, 3)


def loss(params: Any) -> jax.Array:
    return jnp.mean((X @ params["kernel"] + params["bias"] - Y) ** 2)


def trajectory(tx: optax.GradientTransformation, loss: Any, params: Any, steps: int = 30) -> Any:
    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]
    return jax.jit(run)(params)


@pytest.mark.combinations(1)
@pytest.mark.parametrize(
    "inner",
    # So slow that no weight comes near 0, where its root is steep.
    [optax.sgd(0.01, momentum=0.9), optax.adamw(2e-3, weight_decay=0.1)],
    ids=["momentum", "adamw"],
)
@pytest.mark.parametrize("alpha", [1.375, 2.0, 3.0])
def test_plain_is_training_inside_the_loss(
    inner: optax.GradientTransformation, alpha: float
) -> None:
    power = jax.jit(lambda t: lro.layers.powerprop(t, alpha))
    theta = jax.jit(lambda w: lro.layers.powerprop_inverse(w, alpha))(PARAMS)
    theta = trajectory(inner, lambda t: loss(power(t)), theta, 5)
    weights = trajectory(lro.layers.powerprop_updates(inner, alpha, "plain"), loss, PARAMS, 5)
    assert_close(weights, power(theta), 800)


@pytest.mark.parametrize("alpha", [1.375, 2.0, 3.0])
def test_weight_space_takes_the_direction_from_gradients_of_weights(alpha: float) -> None:
    direction = optax.scale_by_adam()
    weights, state = PARAMS, direction.init(PARAMS)
    update = jax.jit(lambda weights, state: direction.update(jax.grad(loss)(weights), state))
    for _ in range(5):
        u, state = update(weights, state)
        w, u_w = np.asarray(weights["kernel"], np.float64), np.asarray(u["kernel"], np.float64)
        theta = np.sign(w) * np.abs(w) ** (1 / alpha)
        theta = theta - 0.02 * alpha * np.abs(theta) ** (alpha - 1) * u_w
        kernel = np.sign(theta) * np.abs(theta) ** alpha
        weights = {
            "kernel": np.float32(kernel),
            "bias": np.float32(weights["bias"] - 0.02 * np.asarray(u["bias"], np.float64)),
        }
    tx = lro.layers.powerprop_updates(optax.adam(0.02), alpha, "weight_space")
    assert_close(trajectory(tx, loss, PARAMS, 5), weights, 800)


def step_of(tx: optax.GradientTransformation, w: Any, g: Any) -> np.ndarray:
    step = lambda params, g: tx.update({"kernel": g}, tx.init(params), params)[0]["kernel"]
    return np.asarray(jax.jit(step)({"kernel": w}, g))


def test_small_steps_move_weights_by_their_powers() -> None:
    w, g, rate, alpha = np.array([[0.3, -0.02, 1.5]]), np.array([[1.7, -0.3, 0.2]]), 1e-7, 2.5
    full, half = alpha**2 * np.abs(w) ** (2 - 2 / alpha), alpha * np.abs(w) ** (1 - 1 / alpha)
    with jax.enable_x64(True):
        sgd = step_of(lro.layers.powerprop_updates(optax.sgd(rate), alpha), w, g) / rate
        adam = optax.adam(rate, eps=0)
        weight_space = step_of(lro.layers.powerprop_updates(adam, alpha), w, g) / rate
        plain = step_of(lro.layers.powerprop_updates(adam, alpha, "plain"), w, g) / rate
    # A step is a line but for a part of the size of the rate.
    assert_close(sgd, -full * g, 100, dtype=np.float32)
    assert abs(sgd[0, 0] + 2.5054) < 1e-3
    assert_close(weight_space, -full * np.sign(g), 100, dtype=np.float32)
    assert_close(plain, -half * np.sign(g), 100, dtype=np.float32)


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
    step = lambda tx: lambda params: tx.update(params, tx.init(params), params)
    programs = [jax.jit(step(tx)).lower(PARAMS).as_text() for tx in (by_rule, named, opposite)]
    assert programs[0] == programs[1] != programs[2]


def test_decay_of_the_inner_optimizer_takes_its_power_to_the_weights() -> None:
    tx = lro.layers.powerprop_updates(optax.adamw(0.1, weight_decay=0.5), 3.0, "plain")
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    step = jax.jit(lambda params: tx.update(zeros, tx.init(params), params)[0])
    new = optax.apply_updates(PARAMS, step(PARAMS))
    assert_close(new["kernel"], 0.95**3 * PARAMS["kernel"], 100)
    assert_close(new["bias"], 0.95 * PARAMS["bias"], 100)


@pytest.mark.slow
def test_no_gradient_is_no_update_and_zero_weights_stay() -> None:
    kernel = PARAMS["kernel"].copy()
    kernel[1] = 0
    params = {**PARAMS, "kernel": kernel}
    zeros = jax.tree.map(np.zeros_like, params)
    for inner in (optax.sgd(0.1), optax.adam(0.1)):
        tx = lro.layers.powerprop_updates(inner, 1.7)
        updates = jax.jit(lambda p, tx=tx: tx.update(zeros, tx.init(p), p)[0])(params)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        end = trajectory(tx, loss, params)["kernel"]
        np.testing.assert_array_equal(end[1], 0.0)
        assert (end[0] != kernel[0]).all()


def test_exponent_one_is_the_inner_optimizer_to_the_last_bit() -> None:
    inner = optax.adamw(0.02)

    def run(tx: optax.GradientTransformation) -> Any:
        params, state = PARAMS, tx.init(PARAMS)
        for seed in range(3):
            gradients = jax.tree.map(lambda p, s=seed: np.cos(p + np.float32(s)), PARAMS)
            updates, state = jax.jit(tx.update)(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params

    tx = lro.layers.powerprop_updates(inner, 1)
    jax.tree.map(np.testing.assert_array_equal, run(tx), run(inner))


def test_a_schedule_sets_the_exponent_while_the_function_stays() -> None:
    factory = optax.inject_hyperparams(
        lro.layers.powerprop_updates,
        static_args=("inner", "mode", "where"),
        hyperparam_dtype=jnp.float32,
    )
    tx = factory(optax.adam(0.02), alpha=optax.linear_schedule(1.0, 2.0, 20))
    state = tx.init(PARAMS)
    zeros = jax.tree.map(np.zeros_like, PARAMS)
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
    gradients = jax.tree.map(lambda p: np.full_like(p, 0.1), params)
    updates, _ = jax.jit(tx.update)(gradients, state, params)
    wide = jax.tree.map(lambda p: p.astype(np.float32), (gradients, params))
    exact, _ = jax.jit(tx.update)(wide[0], state, wide[1])
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(exact), strict=True):
        assert x.dtype == jnp.bfloat16
        half = 0.51  # of a unit in the last place
        assert_close(x, y, half, size=np.abs(y), dtype=jnp.bfloat16)


def test_it_needs_parameters_and_a_known_mode() -> None:
    tx = lro.layers.powerprop_updates(optax.sgd(0.1), 2.0)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="mode='adaptive'"):
        lro.layers.powerprop_updates(optax.sgd(0.1), 2.0, "adaptive")  # type: ignore[arg-type]
