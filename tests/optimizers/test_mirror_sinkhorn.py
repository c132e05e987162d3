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
    path,
    random_problem,
    repeated,
    rounded,
    run,
    solve,
)
import pytest
from scipy.special import xlogy

import lowrank_optax as lro
from lowrank_optax.optimizers import minimize_over_couplings


def test_two_by_two_with_uniform_marginals() -> None:
    seen = path(repeated(SWAP, 10), HALF, HALF)
    last, average = (np.asarray(x)[[1, 2, 10], 0, 0] for x in (seen.coupling, seen.mean))
    np.testing.assert_allclose(last, [0.382241, 0.44092, 0.49865], atol=1e-6)
    np.testing.assert_allclose(average, [0.31612, 0.35772, 0.454088], atol=1e-6)


def test_two_by_two_with_other_marginals() -> None:
    seen = path(repeated(COST, 10), ROWS, COLUMNS)
    expected = [[0.363664, 0.371112], [0.036336, 0.228888]]
    np.testing.assert_allclose(seen.coupling[1], expected, atol=1e-6)
    expected = [[0.321832, 0.395556], [0.078168, 0.204444]]
    np.testing.assert_allclose(seen.mean[1], expected, atol=1e-6)
    expected = [[0.434823, 0.265177], [0.020499, 0.279501]]
    np.testing.assert_allclose(seen.coupling[2], expected, atol=1e-6)
    late = solve(COST, ROWS, COLUMNS, 1000)
    assert np.sum(COST * late.mean) == pytest.approx(0.441242, abs=3e-6)  # below the optimum, .45
    assert np.sum(COST * late.plan) == pytest.approx(0.450465, abs=3e-6)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    shape=st.sampled_from([(1, 3), (6, 4), (4, 6)]),
    first=st.sampled_from(["columns", "rows"]),
    seed=st.integers(0, 99),
)
def test_follows_numpy_for_a_quadratic(shape: tuple[int, int], first: Any, seed: int) -> None:
    cost, rows, columns = random_problem(*shape, seed)
    steps = 5
    gradient = lambda plan: cost + 3 * plan
    expected = iterates(gradient, rows, columns, steps, 4.0, first == "columns")
    seen = path(repeated(cost, steps), rows, columns, 3.0, bound=4.0, first=first)
    np.testing.assert_allclose(seen.coupling, expected, atol=2e-6)
    means = [np.mean(expected[: t + 1], axis=0) for t in range(steps + 1)]
    np.testing.assert_allclose(seen.mean, means, atol=2e-6)


@pytest.mark.parametrize("first", ["columns", "rows"])
def test_each_step_makes_its_sums_right_and_mass_stays_one(first: Any) -> None:
    cost, rows, columns = random_problem(6, 4)
    seen = path(repeated(cost, 20), rows, columns, first=first)
    for t, plan in enumerate(np.asarray(seen.coupling, np.float64)[1:9], 1):
        axis, marginal = (0, columns) if (t % 2 == 1) == (first == "columns") else (1, rows)
        np.testing.assert_allclose(plan.sum(axis), marginal, atol=5e-7)
        assert plan.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("first", ["columns", "rows"])
def test_the_inequality_of_the_regret_bound_at_every_step(first: Any) -> None:
    # eta <G, P_t - P*> <= KL(P*||P_t) - KL(P*||P_t+1) + eta^2 B^2 / 2, for any feasible P*.
    rng = np.random.default_rng(0)
    _, rows, columns = random_problem(5, 4)
    gradients = np.stack(
        [
            rng.uniform(-1, 1, (5, 4)) if t % 3 else rng.choice([-1.0, 1.0], (5, 4))
            for t in range(1, 41)
        ]
    )
    with jax.enable_x64(True):
        drawn = [rng.random((5, 4)) ** power for power in (0.5, 2, 20)]
        targets = [np.asarray(rounded(x, rows, columns)) for x in drawn]
        seen = jax.tree.map(np.asarray, path(gradients, rows, columns, bound=1.0, first=first))
    delta = np.abs(np.log(rows)).max() + np.abs(np.log(columns)).max()
    rates = np.sqrt(delta / np.arange(1, 41))
    for target in targets:
        divergence = [np.sum(xlogy(target, target) - target * x) for x in seen.state.log_coupling]
        left = rates * np.sum(gradients * (seen.coupling[:-1] - target), axis=(1, 2))
        assert (left <= -np.diff(divergence) + rates**2 / 2 + 1e-9).all()
        assert divergence[0] <= delta
        assert left.sum() <= divergence[0] + np.sum(rates**2) / 2 + 1e-9
    assert float(seen.state.rates[-1]) == pytest.approx(rates.sum(), rel=1e-5)


def test_without_gradients_it_becomes_sinkhorn_at_the_temperature_reached() -> None:
    cost, rows, columns = random_problem(5, 4)
    costs = np.concatenate([repeated(cost, 9), repeated(0 * cost, 400)])
    seen = path(costs, rows, columns, bound=1.0)
    kernel = np.exp(-float(seen.state.rates[9]) * cost)
    column = np.ones(4)
    for _ in range(500):
        row = rows / (kernel @ column)
        column = columns / (kernel.T @ row)
    np.testing.assert_allclose(seen.coupling[-1], row[:, None] * kernel * column, atol=1e-5)


def test_a_constant_added_to_gradients_changes_nothing() -> None:
    cost, rows, columns = random_problem(6, 4)
    one, other = (solve(c, rows, columns, 51, bound=1.0) for c in (cost, cost + 7))
    np.testing.assert_allclose(one.coupling, other.coupling, atol=1e-5)
    np.testing.assert_allclose(one.plan, other.plan, atol=1e-5)


def test_potentials_added_to_gradients_leave_the_answer() -> None:
    shifted = COST + np.array([[0.3], [-0.2]]) + np.array([0.5, 0.1])
    plans = [solve(c, ROWS, COLUMNS, 1000, average="suffix").plan for c in (COST, shifted)]
    np.testing.assert_allclose(plans[0], plans[1], atol=1e-3)
    np.testing.assert_allclose(plans[0], [[0.4, 0.3], [0, 0.3]], atol=1e-3)


@pytest.mark.parametrize("average", ["uniform", "weighted", "suffix", "last"])
def test_the_transposed_problem_has_the_transposed_answer(average: Any) -> None:
    cost, rows, columns = random_problem(6, 4)
    one = path(repeated(cost, 20), rows, columns, average=average)
    other = path(repeated(cost.T, 20), columns, rows, average=average, first="rows")
    np.testing.assert_allclose(one.mean, np.swapaxes(other.mean, 1, 2), atol=1e-6)


@pytest.mark.parametrize("average", ["uniform", "weighted", "suffix", "last"])
def test_averages_are_those_of_the_iterates(average: Any) -> None:
    cost, rows, columns = random_problem(6, 4)
    seen = path(repeated(cost, 20), rows, columns, average=average)
    plans, rates = np.asarray(seen.coupling), np.diff(seen.state.rates)
    for t in range(20):
        expected = _mean(average, plans[: t + 1], rates[:t])
        np.testing.assert_allclose(seen.mean[t], expected, atol=1e-6)
    np.testing.assert_array_equal(seen.state.count, np.arange(21))


def _mean(average: str, plans: np.ndarray, rates: np.ndarray) -> np.ndarray:
    count = len(plans)
    if average == "uniform":
        return np.mean(plans, axis=0)
    if average == "last" or count == 1:
        return plans[-1]
    if average == "weighted":
        return np.average(plans[:-1], axis=0, weights=rates)
    power = 2 ** (len(bin(count)) - 3)  # the largest of at most count
    return np.mean(plans[power // 2 - 1 :], axis=0)


@pytest.mark.slow
def test_jit_and_scan_equal_a_loop() -> None:
    cost, rows, columns = random_problem(6, 4)
    solver = lro.mirror_sinkhorn(rows, columns)
    gradient = lambda plan: jnp.asarray(cost, jnp.float32) + 2 * plan
    state = solver.init()
    for _ in range(3):
        state = solver.update(gradient(solver.coupling(state)), state)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        run(solver, gradient, 3),
        state,
    )


def test_vmap_over_marginals_and_costs_equals_a_loop() -> None:
    problems = [random_problem(6, 4, seed) for seed in range(3)]
    stacked = [np.stack(x) for x in zip(*problems, strict=True)]
    plans = jax.vmap(lambda *problem: solve(*problem, 30).plan)(*stacked)
    for plan, problem in zip(plans, problems, strict=True):
        np.testing.assert_allclose(plan, solve(*problem, 30).plan, atol=2e-6)


def test_noisy_costs_converge_in_average() -> None:
    cost, rows, columns = random_problem(10, 10)
    best, cost = optimum(cost, rows, columns), jnp.asarray(cost, jnp.float32)
    noisy = lambda plan, key: cost + jax.random.rademacher(key, (10, 10)) / 2
    solver = lro.mirror_sinkhorn(rows, columns, bound=1.5)

    @jax.jit
    def more(state: Any) -> Any:
        state = minimize_over_couplings(solver, noisy, 800, key=jax.random.key(0), state=state)
        return state, jnp.sum(cost * solver.plan(state))

    state, costs = solver.init(), []
    for _ in range(4):
        state, value = more(state)
        costs.append(float(value))
    gaps = costs[0] - best, costs[3] - best
    # As one over the root of the steps, four times as many here: half the gap.
    assert gaps[0] < 0.03
    assert 0 < gaps[1] < 0.6 * gaps[0]
    assert int(state.count) == 3200


def test_losses_that_change_every_step_have_little_regret() -> None:
    rng = np.random.default_rng(0)
    _, rows, columns = random_problem(8, 8)
    costs = rng.uniform(-1, 1, (2000, 8, 8)) + 0.3 * np.eye(8)
    seen = path(costs, rows, columns, bound=1.3)
    paid = np.sum(costs * seen.coupling[:-1], axis=(1, 2))
    best = optimum(costs.mean(0), rows, columns)
    assert paid.mean() - best < 0.03
    assert paid[:20].mean() > paid[1000:].mean()


def test_the_running_bound_is_the_largest_gradient_and_zero_moves_nothing() -> None:
    scales = np.array([0.0, 1.0, 3.0, 2.0, 0, 0, 0, 0, 0, 0])
    seen = path(scales[:, None, None] * COST, ROWS, COLUMNS)
    np.testing.assert_allclose(seen.coupling[1], np.outer(ROWS, COLUMNS), atol=1e-6)
    assert float(seen.state.rates[1]) == 0
    assert seen.state.bound[1:6].tolist() == [0.0, 2.0, 6.0, 6.0, 6.0]
    plans = [path(repeated(s * COST, 10), ROWS, COLUMNS).mean for s in (1.0, 1e4)]
    np.testing.assert_allclose(plans[0], plans[1], atol=1e-5)


def test_a_learning_rate_or_schedule_replaces_the_rule() -> None:
    steps = lambda rate: solve(COST, ROWS, COLUMNS, 4, learning_rate=rate, average="last").state
    constant_rate = steps(0.25)
    assert float(constant_rate.rates) == pytest.approx(1.0)
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4
    schedule = lambda count: 0.5 / (1 + count)
    assert float(steps(schedule).rates) == pytest.approx(0.5 * harmonic)
    traced = jax.jit(
        lambda rate: minimize_over_couplings(
            lro.mirror_sinkhorn(ROWS, COLUMNS, learning_rate=rate), constant(COST), 4
        )
    )(0.25)
    np.testing.assert_allclose(traced.log_coupling, constant_rate.log_coupling, atol=1e-6)
