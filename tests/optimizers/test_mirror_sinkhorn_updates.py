"""`mirror_sinkhorn_updates`: couplings as logits, trained as optax trains anything."""

import functools
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optimizers.transport_problems import COLUMNS, COST, ROWS, random_problem, rounded, solve
import pytest

from lowrank_optax.optimizers import coupling_from_logits, mirror_sinkhorn_updates

STEPS = 6


def start(rows: Any, columns: Any) -> jax.Array:
    return jnp.asarray(np.log(np.outer(rows, columns)), jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def train(tx: Any, params: Any, gradients: Any, steps: int = STEPS) -> Any:
    """Parameters after steps with gradients that stay the same."""

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]


@pytest.mark.parametrize("options", [{}, {"bound": 2.0}, {"learning_rate": 0.3}])
def test_logits_of_float64_follow_the_solver_in_float64(options: Any) -> None:
    with jax.enable_x64(True):
        rows, columns, cost = (jnp.asarray(x, jnp.float64) for x in (ROWS, COLUMNS, COST))
        expected = solve(cost, rows, columns, STEPS, **options).state.log_coupling
        logits = jnp.log(jnp.outer(rows, columns))
        found = train(mirror_sinkhorn_updates(rows, columns, **options), logits, cost)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"bound": 2.0}, {"learning_rate": 0.3}, {"first": "rows"}])
def test_logits_follow_the_solver(options: Any) -> None:
    expected = solve(COST, ROWS, COLUMNS, STEPS, **options).state.log_coupling
    tx = mirror_sinkhorn_updates(ROWS, COLUMNS, **options)
    logits = train(tx, start(ROWS, COLUMNS), jnp.asarray(COST, jnp.float32))
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.slow
def test_uniform_marginals_of_each_shape_and_stacked_matrices() -> None:
    costs = {"a": random_problem(3, 4)[0], "b": random_problem(5, 2)[0]}
    costs = {name: jnp.asarray(cost, jnp.float32) for name, cost in costs.items()}
    params = jax.tree.map(jnp.zeros_like, costs)
    uniform = mirror_sinkhorn_updates()
    found = train(uniform, params, costs)
    for name, (n, m) in {"a": (3, 4), "b": (5, 2)}.items():
        tx = mirror_sinkhorn_updates(np.ones(n), np.ones(m))
        alone = train(tx, params[name], costs[name])
        np.testing.assert_allclose(found[name], alone, atol=1e-6)
        np.testing.assert_allclose(np.exp(found[name]).sum(1), np.full(n, 1 / n), atol=1e-6)
    batch = np.stack([costs["a"], 4 * costs["a"] - 1])
    stacked = train(uniform, np.zeros_like(batch), batch)
    for one, gradient in zip(np.asarray(stacked), batch, strict=True):
        alone = train(uniform, np.zeros_like(gradient), gradient)
        np.testing.assert_allclose(one, alone, atol=1e-5)
    mapped = jax.vmap(lambda g: train(uniform, jnp.zeros_like(g), g))(batch)
    np.testing.assert_allclose(mapped, stacked, atol=1e-5)


def test_gradients_by_the_coupling_arrive_at_the_logits() -> None:
    logits = start(ROWS, COLUMNS)
    loss = lambda coupling: jnp.sum(coupling**2) + jnp.sum(COST * coupling)
    by_logits = jax.jit(jax.grad(lambda x: loss(coupling_from_logits(x))))(logits)
    coupling = np.asarray(jnp.exp(logits))
    assert_close(by_logits, 2 * coupling + COST)
    np.testing.assert_array_equal(coupling_from_logits(logits), coupling)


def test_it_trains_beside_other_parameters() -> None:
    cost = jnp.asarray(COST, jnp.float32)
    params = {"logits": start(ROWS, COLUMNS), "scale": jnp.array(3.0)}

    def loss(params: Any) -> jax.Array:
        coupling = coupling_from_logits(params["logits"])
        return jnp.sum(cost * coupling) + (params["scale"] - 1) ** 2

    couplings = mirror_sinkhorn_updates(ROWS, COLUMNS)
    labels = {"logits": "coupling", "scale": "other"}
    tx = optax.partition({"coupling": couplings, "other": optax.sgd(0.3)}, labels)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(
        lambda params: jax.lax.scan(step, (params, tx.init(params)), length=500)
    )(params)
    plan = rounded(np.exp(params["logits"]), ROWS, COLUMNS)
    assert float(np.sum(cost * plan)) == pytest.approx(0.45, abs=1e-2)
    assert float(params["scale"]) == pytest.approx(1, abs=1e-4)


def test_masked_multi_steps_and_injected_hyperparameters() -> None:
    gradient, params = jnp.asarray(COST, jnp.float32), start(ROWS, COLUMNS)
    expected = train(mirror_sinkhorn_updates(ROWS, COLUMNS), params, gradient)
    masked = optax.masked(mirror_sinkhorn_updates(ROWS, COLUMNS), {"x": True, "bias": False})
    both = train(masked, {"x": params, "bias": jnp.zeros(2)}, {"x": gradient, "bias": jnp.ones(2)})
    np.testing.assert_allclose(both["x"], expected, atol=1e-5)
    accumulated = optax.MultiSteps(mirror_sinkhorn_updates(ROWS, COLUMNS), 2)
    found = train(accumulated.gradient_transformation(), params, gradient, 2 * STEPS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    injected = optax.inject_hyperparams(mirror_sinkhorn_updates, ("first",))
    tx = injected(jnp.asarray(ROWS), jnp.asarray(COLUMNS), learning_rate=0.3)
    plain = train(mirror_sinkhorn_updates(ROWS, COLUMNS, learning_rate=0.3), params, gradient)
    np.testing.assert_allclose(train(tx, params, gradient), plain, atol=1e-5)


def test_updates_keep_the_dtype_of_gradients_and_state_its_own() -> None:
    tx = mirror_sinkhorn_updates()
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        params = jnp.zeros((3, 4), dtype)
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert updates.dtype == dtype
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)


def test_bad_gradients_are_seen_in_updates_and_never_in_the_state() -> None:
    tx = mirror_sinkhorn_updates(ROWS, COLUMNS)
    params = start(ROWS, COLUMNS)
    bad = jnp.asarray(COST, jnp.float32).at[0, 1].set(jnp.nan)
    updates, state = jax.jit(tx.update)(bad, tx.init(params), params)
    assert np.isnan(updates).any()
    assert float(state.bound) == 2
    skipping = optax.apply_if_finite(tx, 3)
    updates, _ = jax.jit(skipping.update)(bad, skipping.init(params), params)
    assert not np.any(updates)


@pytest.mark.slow
def test_forbidden_cells_and_empty_leaves_stay() -> None:
    tx = mirror_sinkhorn_updates()
    logits = jnp.where(jnp.eye(3) > 0, -jnp.inf, 0.0)
    gradient = jnp.where(jnp.eye(3) > 0, jnp.nan, jnp.asarray(random_problem(3, 3)[0]))
    found = train(tx, logits, gradient)
    assert np.isneginf(np.diag(found)).all()
    np.testing.assert_allclose(np.exp(found).sum(1), np.full(3, 1 / 3), atol=1e-6)
    empty = {"none": jnp.zeros((0, 3)), "hole": None, "masked": optax.MaskedNode()}
    updates, _ = tx.update(empty, tx.init(empty), empty)
    assert updates["none"].shape == (0, 3)
    assert tx.update({}, tx.init({}), {})[0] == {}


def test_bad_arguments_are_refused_where_they_are_given() -> None:
    tx = mirror_sinkhorn_updates(ROWS, COLUMNS)
    with pytest.raises(ValueError, match="bias"):
        tx.init({"bias": jnp.zeros(3)})
    with pytest.raises(ValueError, match="row_marginal has 2 entries"):
        tx.init({"logits": jnp.zeros((3, 2))})
    with pytest.raises(ValueError, match="needs params"):
        tx.update(jnp.zeros((2, 2)), tx.init(jnp.zeros((2, 2))))
    with pytest.raises(ValueError, match="must be finite and not negative"):
        mirror_sinkhorn_updates(np.array([-1.0, 2.0]))
    with pytest.raises(ValueError, match="first='both'"):
        mirror_sinkhorn_updates(first="both")
