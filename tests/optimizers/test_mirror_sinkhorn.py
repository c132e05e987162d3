"""`mirror_sinkhorn`: the online solver, against NumPy and the numbers of its specification."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from optimizers.transport_problems import (
    COLUMNS,
    COST,
    HALF,
    ROWS,
    SWAP,
    constant,
    iterates,
    optimum,
    random_problem,
    run,
)
import pytest
from scipy.special import xlogy

import lowrank_optax as lro
from lowrank_optax.optimizers import minimize_over_couplings


@pytest.mark.parametrize(
    ("steps", "last", "average"),
    [(1, 0.382241, 0.31612), (2, 0.44092, 0.35772), (10, 0.49865, 0.454088)],
)
def test_two_by_two_with_uniform_marginals(steps: int, last: float, average: float) -> None:
    solver = lro.mirror_sinkhorn(HALF, HALF)
    state = run(solver, constant(SWAP), steps)
    assert solver.coupling(state)[0, 0] == pytest.approx(last, abs=1e-6)
    assert solver.plan(state, rounded=False)[0, 0] == pytest.approx(average, abs=1e-6)


def test_two_by_two_with_other_marginals() -> None:
    solver = lro.mirror_sinkhorn(ROWS, COLUMNS)
    first, second, late = (run(solver, constant(COST), steps) for steps in (1, 2, 1000))
    expected = [[0.363664, 0.371112], [0.036336, 0.228888]]
    np.testing.assert_allclose(solver.coupling(first), expected, atol=1e-6)
    expected = [[0.321832, 0.395556], [0.078168, 0.204444]]
    np.testing.assert_allclose(solver.plan(first, rounded=False), expected, atol=1e-6)
    expected = [[0.434823, 0.265177], [0.020499, 0.279501]]
    np.testing.assert_allclose(solver.coupling(second), expected, atol=1e-6)
    cost = lambda rounded: float(np.sum(COST * np.asarray(solver.plan(late, rounded))))
    assert cost(False) == pytest.approx(0.441242, abs=3e-6)  # below the optimum, .45
    assert cost(True) == pytest.approx(0.450465, abs=3e-6)


@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(1, 6),
    m=st.integers(1, 6),
    first=st.sampled_from(["columns", "rows"]),
    seed=st.integers(0, 99),
)
def test_follows_numpy_for_a_quadratic(n: int, m: int, first: Any, seed: int) -> None:
    cost, rows, columns = random_problem(n, m, seed)
    steps = 5
    gradient = lambda plan: cost.astype(plan.dtype) + 3 * plan
    expected = iterates(gradient, rows, columns, steps, 4.0, first == "columns")
    solver = lro.mirror_sinkhorn(rows, columns, bound=4.0, first=first)
    state, update = solver.init(), jax.jit(solver.update)
    for t in range(1, steps + 1):
        state = update(gradient(np.asarray(solver.coupling(state))), state)
        np.testing.assert_allclose(solver.coupling(state), expected[t], atol=2e-6)
        mean = np.mean(expected[: t + 1], axis=0)
        np.testing.assert_allclose(solver.plan(state, rounded=False), mean, atol=2e-6)


@pytest.mark.parametrize("first", ["columns", "rows"])
def test_each_step_makes_its_sums_right_and_mass_stays_one(first: Any) -> None:
    cost, rows, columns = random_problem(7, 5)
    solver = lro.mirror_sinkhorn(rows, columns, first=first)
    state, update = solver.init(), jax.jit(solver.update)
    for t in range(1, 9):
        state = update(cost, state)
        plan = np.asarray(solver.coupling(state), np.float64)
        axis, marginal = (0, columns) if (t % 2 == 1) == (first == "columns") else (1, rows)
        np.testing.assert_allclose(plan.sum(axis), marginal, atol=5e-7)
        assert plan.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("first", ["columns", "rows"])
def test_the_inequality_of_the_regret_bound_at_every_step(first: Any) -> None:
    # eta <G, P_t - P*> <= KL(P*||P_t) - KL(P*||P_t+1) + eta^2 B^2 / 2, for any feasible P*.
    rng = np.random.default_rng(0)
    _, rows, columns = random_problem(5, 4)
    with jax.enable_x64(True):
        solver = lro.mirror_sinkhorn(rows, columns, bound=1.0, first=first)
        targets = [
            np.asarray(lro.round_to_polytope(rng.random((5, 4)) ** power, rows, columns))
            for power in (0.5, 2, 20)
        ]
        delta = np.abs(np.log(rows)).max() + np.abs(np.log(columns)).max()
        kl = lambda p, log_q: np.sum(xlogy(p, p) - p * log_q)
        state, update = solver.init(), jax.jit(solver.update)
        regret, rates = np.zeros(3), []
        for t in range(1, 41):
            gradient = rng.uniform(-1, 1, (5, 4)) if t % 3 else rng.choice([-1.0, 1.0], (5, 4))
            rate, old = np.sqrt(delta / t), state
            state = update(gradient, state)
            plan = np.asarray(solver.coupling(old))
            for i, target in enumerate(targets):
                left = rate * np.sum(gradient * (plan - target))
                fall = kl(target, old.log_coupling) - kl(target, state.log_coupling)
                assert left <= fall + rate**2 / 2 + 1e-9
                regret[i] += left
            rates.append(rate)
        start = [kl(target, solver.init().log_coupling) for target in targets]
        assert max(start) <= delta
        assert (regret <= np.array(start) + np.sum(np.square(rates)) / 2 + 1e-9).all()
        assert float(state.rates) == pytest.approx(sum(rates), rel=1e-5)


def test_without_gradients_it_becomes_sinkhorn_at_the_temperature_reached() -> None:
    cost, rows, columns = random_problem(5, 4)
    solver = lro.mirror_sinkhorn(rows, columns, bound=1.0)
    state = run(solver, constant(cost), 9)
    inverse_temperature = float(state.rates)
    state = run(solver, constant(0 * cost), 400, state=state)
    kernel = np.exp(-inverse_temperature * cost)
    column = np.ones(4)
    for _ in range(500):
        row = rows / (kernel @ column)
        column = columns / (kernel.T @ row)
    np.testing.assert_allclose(solver.coupling(state), row[:, None] * kernel * column, atol=1e-5)


def test_a_constant_added_to_gradients_changes_nothing() -> None:
    cost, rows, columns = random_problem(6, 5)
    solver = lro.mirror_sinkhorn(rows, columns, bound=1.0)
    one, other = (run(solver, constant(c), 51) for c in (cost, cost + 7))
    np.testing.assert_allclose(solver.coupling(one), solver.coupling(other), atol=1e-5)
    np.testing.assert_allclose(solver.plan(one), solver.plan(other), atol=1e-5)


def test_potentials_added_to_gradients_leave_the_answer() -> None:
    shifted = COST + np.array([[0.3], [-0.2]]) + np.array([0.5, 0.1])
    solver = lro.mirror_sinkhorn(ROWS, COLUMNS, average="suffix")
    plans = [solver.plan(run(solver, constant(c), 1000)) for c in (COST, shifted)]
    np.testing.assert_allclose(plans[0], plans[1], atol=1e-3)
    np.testing.assert_allclose(plans[0], [[0.4, 0.3], [0, 0.3]], atol=1e-3)


@pytest.mark.parametrize("average", ["uniform", "weighted", "suffix", "last"])
def test_the_transposed_problem_has_the_transposed_answer(average: Any) -> None:
    cost, rows, columns = random_problem(6, 4)
    one = lro.mirror_sinkhorn(rows, columns, average=average)
    other = lro.mirror_sinkhorn(columns, rows, average=average, first="rows")
    plans = [s.plan(run(s, constant(c), 21), False) for s, c in ((one, cost), (other, cost.T))]
    np.testing.assert_allclose(plans[0], plans[1].T, atol=1e-6)


@pytest.mark.parametrize("average", ["uniform", "weighted", "suffix", "last"])
def test_averages_are_those_of_the_iterates(average: Any) -> None:
    cost, rows, columns = random_problem(4, 5)
    solver = lro.mirror_sinkhorn(rows, columns, average=average)
    state, update = solver.init(), jax.jit(solver.update)
    plan = jax.jit(solver.plan, static_argnums=1)
    plans, rates = [np.asarray(solver.coupling(state))], []
    for t in range(1, 20):
        np.testing.assert_allclose(plan(state, False), _mean(average, plans, rates), atol=1e-6)
        before = float(state.rates)
        state = update(cost, state)
        plans.append(np.asarray(solver.coupling(state)))
        rates.append(float(state.rates) - before)
        assert len(plans) == t + 1 == int(state.count) + 1


def _mean(average: str, plans: list[np.ndarray], rates: list[float]) -> np.ndarray:
    count = len(plans)
    if average == "uniform":
        return np.mean(plans, axis=0)
    if average == "last" or count == 1:
        return plans[-1]
    if average == "weighted":
        return np.average(plans[:-1], axis=0, weights=rates)
    power = 2 ** (len(bin(count)) - 3)  # the largest of at most count
    return np.mean(plans[power // 2 - 1 :], axis=0)


def test_jit_and_scan_equal_a_loop() -> None:
    cost, rows, columns = random_problem(6, 4)
    solver = lro.mirror_sinkhorn(rows, columns)
    gradient = lambda plan: jnp.asarray(cost, jnp.float32) + 2 * plan
    state = solver.init()
    for _ in range(7):
        state = solver.update(gradient(solver.coupling(state)), state)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        run(solver, gradient, 7),
        state,
    )


def test_vmap_over_marginals_and_costs_equals_a_loop() -> None:
    problems = [random_problem(5, 4, seed) for seed in range(3)]
    stacked = [jnp.asarray(np.stack(x), jnp.float32) for x in zip(*problems, strict=True)]

    def solve(cost: Any, rows: Any, columns: Any) -> Any:
        solver = lro.mirror_sinkhorn(rows, columns)
        return solver.plan(minimize_over_couplings(solver, constant(cost), 30))

    plans = jax.jit(jax.vmap(lambda c, r, s: solve(c, r, s)))(*stacked)
    for plan, (cost, rows, columns) in zip(plans, problems, strict=True):
        np.testing.assert_allclose(plan, solve(cost, rows, columns), atol=2e-6)


def test_noisy_costs_converge_in_average() -> None:
    cost, rows, columns = random_problem(10, 10)
    best, cost = optimum(cost, rows, columns), jnp.asarray(cost, jnp.float32)
    noisy = lambda plan, key: cost + jax.random.rademacher(key, (10, 10)) / 2
    solver = lro.mirror_sinkhorn(rows, columns, bound=1.5)
    more = jax.jit(
        lambda state: minimize_over_couplings(
            solver, noisy, 800, key=jax.random.key(0), state=state
        )
    )
    states = [more(solver.init())]
    for _ in range(3):
        states.append(more(states[-1]))
    gaps = [float(jnp.sum(cost * solver.plan(states[i]))) - best for i in (0, 3)]
    # As one over the root of the steps, four times as many here: half the gap.
    assert gaps[0] < 0.03
    assert 0 < gaps[1] < 0.6 * gaps[0]
    assert int(states[-1].count) == 3200


def test_losses_that_change_every_step_have_little_regret() -> None:
    rng = np.random.default_rng(0)
    _, rows, columns = random_problem(8, 8)
    costs = jnp.asarray(rng.uniform(-1, 1, (2000, 8, 8)) + 0.3 * np.eye(8), jnp.float32)
    solver = lro.mirror_sinkhorn(rows, columns, bound=1.3)

    def step(state: Any, cost: Any) -> Any:
        return solver.update(cost, state), jnp.sum(cost * solver.coupling(state))

    _, paid = jax.jit(lambda: jax.lax.scan(step, solver.init(), costs))()
    best = optimum(costs.mean(0), rows, columns)
    assert paid.mean() - best < 0.03
    assert paid[:20].mean() > paid[1000:].mean()


def test_the_running_bound_is_the_largest_gradient_and_zero_moves_nothing() -> None:
    solver = lro.mirror_sinkhorn(ROWS, COLUMNS)
    state = solver.update(np.zeros((2, 2)), solver.init())
    np.testing.assert_allclose(solver.coupling(state), np.outer(ROWS, COLUMNS), atol=1e-7)
    assert float(state.rates) == 0
    bounds = []
    for scale in (1.0, 3.0, 2.0):
        state = solver.update(scale * COST, state)
        bounds.append(float(state.bound))
    assert bounds == [2.0, 6.0, 6.0]
    scaled = lro.mirror_sinkhorn(ROWS, COLUMNS)
    plans = [scaled.plan(run(scaled, constant(s * COST), 20)) for s in (1.0, 1e4)]
    np.testing.assert_allclose(plans[0], plans[1], atol=1e-5)


def test_a_learning_rate_or_schedule_replaces_the_rule() -> None:
    solver = lro.mirror_sinkhorn(ROWS, COLUMNS, learning_rate=0.25, average="last")
    other = lro.mirror_sinkhorn(
        ROWS, COLUMNS, learning_rate=lambda count: 0.5 / (1 + count), average="last"
    )
    assert float(run(solver, constant(COST), 4).rates) == pytest.approx(1.0)
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4
    assert float(run(other, constant(COST), 4).rates) == pytest.approx(0.5 * harmonic)
    traced = jax.jit(
        lambda rate: minimize_over_couplings(
            lro.mirror_sinkhorn(ROWS, COLUMNS, learning_rate=rate), constant(COST), 4
        )
    )(0.25)
    expected = run(solver, constant(COST), 4).log_coupling
    np.testing.assert_allclose(traced.log_coupling, expected, atol=1e-6)
