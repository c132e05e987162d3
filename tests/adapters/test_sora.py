"""SoRA: a gated LoRA, the proximal step on its gates, and the ranks that it leaves."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Rows
from lowrank_optax.adapters.training.gate_thresholds import soft_threshold
from tests.adapters.compiled import compiled, gradient, layer_output

LoRA, SoRA = compiled(lro.adapters.LoRA), compiled(lro.adapters.SoRA)
gates = lro.adapters.soft_threshold_gates
RNG = np.random.default_rng(0)
WEIGHTS, X = (RNG.normal(size=s).astype(np.float32) for s in ((3, 6, 5), (7, 6)))
START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    RNG.bit_generator.state = START


@pytest.mark.parametrize("rank", [4, (1, 4, 2)])
def test_it_computes_the_papers_formula(rank: Any) -> None:
    method = SoRA(rank=rank, alpha=6, initial="random")
    params = method.init(jax.random.key(2), WEIGHTS)
    for layer in range(3):
        p, w = method.layer_arrays(params, layer), WEIGHTS[layer]
        a, b, g = (np.asarray(p[k], np.float64) for k in ("A", "B", "gate"))
        own = rank if isinstance(rank, int) else rank[layer]
        assert np.count_nonzero(g) == own
        expected = X @ w + 6 / own * ((X @ a) * g) @ b
        assert np.abs(expected - X @ w).max() > 0.1
        y = layer_output(method, p, Rows(X), X @ w, weight=w)
        np.testing.assert_allclose(y, expected, atol=2e-5)
        np.testing.assert_allclose(X @ method.merged(p, w).weight, expected, atol=2e-5)


def test_with_gates_of_one_it_is_lora_and_at_the_start_the_model() -> None:
    options: Any = {"rank": 3, "alpha": 5, "initial": "random"}
    lora, sora = (m(**options).init(jax.random.key(0), WEIGHTS) for m in (LoRA, SoRA))
    for name in ("A", "B"):
        np.testing.assert_array_equal(sora.trainable[name], lora.trainable[name])
    ones = sora._replace(trainable=sora.trainable | {"gate": np.ones((3, 3), np.float32)})
    same = SoRA(**options).deltas(ones, WEIGHTS)
    assert_close(same, LoRA(**options).deltas(lora, WEIGHTS))
    start = SoRA(rank=3).init(jax.random.key(0), WEIGHTS)
    assert not SoRA(rank=3).deltas(start, WEIGHTS).any()


def test_gates_start_standard_normal_in_float32_and_only_b_moves_first() -> None:
    method = SoRA(rank=400, param_dtype=jnp.bfloat16)
    params = method.init(jax.random.key(2), jax.ShapeDtypeStruct((5, 6, 5), jnp.bfloat16))
    gate = params.trainable["gate"]
    assert gate.dtype == np.float32
    assert params.trainable["A"].dtype == jnp.bfloat16
    assert abs(gate.mean()) < 0.1  # 4.5 standard errors
    assert abs(gate.std() - 1) < 0.07
    method = SoRA(rank=2)
    p, w = method.layer_arrays(method.init(jax.random.key(2), WEIGHTS), 0), WEIGHTS[0]
    loss = lambda p: layer_output(method, p, Rows(X), X @ w, weight=w).sum()
    slopes = gradient(loss, p)
    assert slopes["B"].all()
    assert not slopes["A"].any()
    assert not slopes["gate"].any()


def test_the_specifications_thresholds() -> None:
    z = jnp.array([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, -0.15])
    soft = [0, 0, 0.05, 0.1, 0.15, 0.2, -0.05]
    code = [0, 0.1, 0, 0.1, 0.15, 0.2, 0]
    np.testing.assert_allclose(soft_threshold(z, 0.1), soft, atol=1e-7)
    np.testing.assert_allclose(soft_threshold(z, 0.1, True), code, atol=1e-7)
    assert np.isnan(soft_threshold(jnp.nan, 0.1))


def test_the_threshold_does_not_expand_and_its_steps_end_at_the_minimum() -> None:
    a, b = RNG.normal(size=(2, 1000)).astype(np.float32)
    apart = np.abs(soft_threshold(a, 0.3) - soft_threshold(b, 0.3))
    assert (apart <= np.abs(a - b) + 1e-6).all()
    # Proximal gradient steps on (g - a)² / 2 + 0.3 |g|, whose minimum is soft(a, 0.3).
    tx, params = gates(optax.sgd(0.5), 0.5, 0.3), {"gate": jnp.asarray(b)}
    step = lambda p, _: (stepped(tx, p, {"gate": p["gate"] - a}), None)
    found = jax.jit(lambda p: jax.lax.scan(step, p, None, 40)[0])(params)["gate"]
    np.testing.assert_allclose(found, soft_threshold(a, 0.3), atol=1e-6)


def stepped(tx: Any, params: Any, gradients: Any) -> Any:
    updates, _ = tx.update(gradients, tx.init(params), params)
    return optax.apply_updates(params, updates)


def run(tx: Any, params: Any, gradients: Any) -> Any:
    """The parameters after each of the steps with these gradients, ``[steps, ...]``."""

    def step(carry: Any, g: Any) -> Any:
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    body = lambda c: jax.lax.scan(step, c, gradients)[1]
    return jax.tree.map(np.asarray, jax.jit(body)((params, tx.init(params))))


@pytest.mark.parametrize("zero_below", [False, True])
def test_without_a_signal_gates_shrink_by_the_threshold_in_each_step(zero_below: bool) -> None:
    start = RNG.normal(size=(3, 50)).astype(np.float32)
    tx = gates(optax.adam(0.1), 1.0, 0.01, zero_below=zero_below)
    params = {"gate": jnp.asarray(start), "A": jnp.ones(3)}
    found = run(tx, params, jax.tree.map(lambda x: jnp.zeros((60, *x.shape)), params))
    size = np.abs(start)
    for t in (1, 10, 60):
        limit = t + zero_below  # the official operator also zeroes what is left below the threshold
        clear = np.abs(size - limit * 0.01) > 1e-5
        np.testing.assert_array_equal(
            (found["gate"][t - 1] != 0)[clear], (size > limit * 0.01)[clear]
        )
        left = found["gate"][t - 1] != 0
        expected = np.sign(start) * (size - t * 0.01)
        np.testing.assert_allclose(found["gate"][t - 1][left], expected[left], atol=1e-5)
    np.testing.assert_array_equal(found["A"][-1], 1)


def test_it_is_the_two_line_reference_with_the_optimizers_step_before_it() -> None:
    schedule, lam, shape = optax.linear_schedule(0.02, 0.0, 30), 0.7, (2, 8)
    params = {"up": {"gate": RNG.normal(size=shape) * 0.4, "B": RNG.normal(size=shape)}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    gradients = jax.tree.map(
        lambda x: jnp.asarray(RNG.normal(size=(30, *x.shape)), jnp.float32), params
    )
    found = run(gates(optax.adam(schedule), schedule, lam), params, gradients)
    inner = optax.adam(schedule)
    state, now, update = inner.init(params), params, jax.jit(inner.update)
    for t, g in enumerate(zip(*jax.tree.leaves(gradients), strict=True)):
        updates, state = update(jax.tree.unflatten(jax.tree.structure(params), g), state)
        now = optax.apply_updates(now, updates)
        gate, xi = np.asarray(now["up"]["gate"]), float(schedule(t)) * lam
        now["up"]["gate"] = jnp.asarray(np.sign(gate) * np.maximum(np.abs(gate) - xi, 0))
        np.testing.assert_allclose(found["up"]["gate"][t], now["up"]["gate"], atol=1e-6)
        np.testing.assert_allclose(found["up"]["B"][t], now["up"]["B"], atol=1e-6)
    assert 0 < np.count_nonzero(found["up"]["gate"][-1]) < 16


def test_a_gate_cannot_return_where_the_threshold_is_above_adams_largest_step() -> None:
    params = {"gate": jnp.asarray(RNG.normal(size=64) * 0.05, jnp.float32)}
    gradients = {"gate": jnp.asarray(RNG.standard_cauchy(size=(200, 64)), jnp.float32)}
    found = run(gates(optax.adam(1e-3), 1e-3, 7.3), params, gradients)["gate"] != 0
    assert not (found[1:] & ~found[:-1]).any()
    assert 0 < found[0].sum() > found[5].sum()
    # Zero is not absorbing otherwise.
    found = run(gates(optax.adam(1e-3), 1e-3, 0.1), params, gradients)["gate"] != 0
    assert (found[1:] & ~found[:-1]).any()


def test_multi_steps_masks_partitions_and_hyperparameters_go_through() -> None:
    params = {"x": {"gate": jnp.ones(2)}, "y": {"gate": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    masked = optax.masked(
        gates(optax.sgd(1.0), 1.0, 0.25), {"x": {"gate": True}, "y": {"gate": False}}
    )
    tx = optax.MultiSteps(masked, 2)
    found = run(tx, params, jax.tree.map(lambda x: jnp.stack([x] * 4), zeros))
    np.testing.assert_allclose(found["x"]["gate"][:, 0], [1, 0.75, 0.75, 0.5])
    np.testing.assert_array_equal(found["y"]["gate"], 1)
    tx = optax.partition(
        {"x": gates(optax.sgd(1.0), 1.0, 0.25), "y": optax.sgd(1.0)}, {"x": "x", "y": "y"}
    )
    moved = stepped(tx, params, zeros)
    assert (moved["x"]["gate"][0], moved["y"]["gate"][0]) == (0.75, 1)
    injected = optax.inject_hyperparams(gates, static_args=("inner", "names"))
    tx = injected(inner=optax.sgd(1.0), learning_rate=optax.constant_schedule(0.5), penalty=0.5)
    moved = jax.jit(lambda p: stepped(tx, p, zeros))(params)
    np.testing.assert_allclose(moved["x"]["gate"], 0.75)


def test_bfloat16_gates_reach_exact_zeros_too() -> None:
    params = {"gate": jnp.array([0.5, 0.011, -0.3], jnp.bfloat16)}
    moved = stepped(gates(optax.sgd(1.0), 1.0, 0.02), params, jax.tree.map(jnp.zeros_like, params))
    assert moved["gate"].dtype == jnp.bfloat16
    np.testing.assert_allclose(moved["gate"].astype(np.float32), [0.48, 0, -0.28], atol=2e-3)
    assert moved["gate"][1] == 0


def test_unusable_arguments_are_refused() -> None:
    inner: Any = optax.sgd(0.1)
    for args, message in (
        ((inner, -1.0, 0.1), r"learning_rate=-1\.0 must be finite"),
        ((inner, 1.0, -0.1), r"penalty=-0\.1 must be finite"),
        ((inner, 1.0, float("nan")), "penalty=nan must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            gates(*args)
    with pytest.raises(ValueError, match="names='gate' must be a sequence"):
        gates(inner, 1.0, 0.1, names="gate")
    with pytest.raises(TypeError, match="inner=adam must be an optax transformation"):
        gates(optax.adam, 1.0, 0.1)
    tx = gates(inner, 1.0, 0.1)
    with pytest.raises(ValueError, match="no parameter is named 'gate'"):
        tx.init({"up": {"A": jnp.ones(2)}})
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update({"gate": jnp.ones(2)}, tx.init({"gate": jnp.ones(2)}))


@pytest.mark.full
def test_a_larger_penalty_leaves_fewer_gates_down_to_the_rank_of_each_target() -> None:
    n, m, steps, rng = 32, 24, 4000, np.random.default_rng(0)
    left, right = rng.normal(size=(n, 3)) / n**0.5, rng.normal(size=(3, m))
    targets = jnp.stack([jnp.asarray(left[:, :r] @ right[:r], jnp.float32) for r in (3, 3, 1)])
    method = lro.adapters.SoRA(rank=8, alpha=16)
    start = method.init(jax.random.key(0), targets).trainable
    schedule = optax.linear_schedule(5e-3, 0.0, steps)
    keys = jax.random.split(jax.random.key(0), steps)

    def fit(p: Any, penalty: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        tx = gates(optax.adam(schedule), schedule, penalty)

        def step(carry: Any, key: jax.Array) -> Any:
            p, state = carry
            x = jax.random.normal(key, (128, n))
            loss = lambda p: jnp.mean((method.times(p, Rows(x)) - x @ target) ** 2)
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, updates), state), None

        (p, _), _ = jax.lax.scan(step, (p, tx.init(p)), keys)
        error = jnp.sum((method.delta(p, target) - target) ** 2) / jnp.sum(target**2)
        return jnp.sum(p["gate"] != 0), error

    fit_all = jax.jit(jax.vmap(fit))
    count, error = map(np.asarray, fit_all(start, jnp.array([0.0, 0.8, 0.8]), targets))
    assert count[0] == 8
    assert count[1] in (3, 4)  # 3 of most starts
    assert count[2] < count[1]
    assert (error < 1e-5).all()
    assert error[0] < 1e-9
