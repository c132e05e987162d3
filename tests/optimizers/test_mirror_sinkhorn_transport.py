"""`optimal_transport`, `round_to_polytope`, masks and slack, against linear programming."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
from optimizers.transport_problems import (
    COLUMNS,
    COST,
    HALF,
    ROWS,
    iterates,
    optimum,
    random_problem,
    rounded,
    solve,
    transport,
    violation,
)
import pytest

import lowrank_optax as lro
from lowrank_optax.optimizers import with_slack


def random_mask(n: int, seed: int = 0) -> np.ndarray:
    """A third of the cells, with the diagonal and the one beside: uniform couplings fit."""
    mask = np.random.default_rng(seed).random((n, n)) < 0.3
    return mask | np.eye(n, dtype=bool) | np.roll(np.eye(n, dtype=bool), 1, axis=1)


@pytest.mark.combinations(1)
@pytest.mark.parametrize("average", ["uniform", "weighted", "suffix", "last"])
@pytest.mark.parametrize("first", ["columns", "rows"])
def test_potentials_equal_the_dense_form(average: Any, first: Any) -> None:
    problem, options = random_problem(5, 7), {"average": average, "first": first}
    with jax.enable_x64(True):
        found = transport(*problem, 21, **options)
        np.testing.assert_allclose(found.plan, solve(*problem, 21, **options).plan, atol=1e-14)


@pytest.mark.slow
def test_potentials_equal_the_dense_form_with_a_mask() -> None:
    cost, _, _ = random_problem(6, 6)
    rows, mask = np.full(6, 1 / 6), random_mask(6)
    dense = solve(cost, rows, rows, 20, mask=mask)
    masked = np.where(mask, cost, np.nan)
    found = transport(masked, rows, rows, 20, average="uniform", mask=mask, bound=None)
    bounded = float(np.abs(cost[mask]).max())
    assert float(dense.state.bound) == pytest.approx(bounded)
    np.testing.assert_allclose(found.plan, dense.plan, atol=1e-5)


def test_the_average_of_the_worked_example() -> None:
    found = transport(COST, ROWS, COLUMNS, 1000, average="uniform")
    assert float(found.value) == pytest.approx(0.450465, abs=3e-6)
    with jax.enable_x64(True):
        found = transport(COST, ROWS, COLUMNS, 31, average="uniform")
        plans = iterates(lambda plan: COST, ROWS, COLUMNS, 31, 2.0)
        expected = rounded(np.mean(plans, axis=0), ROWS, COLUMNS)
        np.testing.assert_allclose(found.plan, expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_values_and_lower_bounds_close_in_on_the_optimum(seed: int) -> None:
    cost, rows, columns = random_problem(12, 9, seed)
    best = optimum(cost, rows, columns)
    gaps = {"last": [], "uniform": []}
    for average, seen in gaps.items():
        for steps in (50, 400, 3200):
            found = transport(cost, rows, columns, steps, average=average)
            found = jax.tree.map(np.asarray, found)
            assert float(found.value) >= best - 1e-6
            assert float(found.lower_bound) <= best + 1e-6
            assert float(found.gap) == pytest.approx(float(found.value - found.lower_bound))
            assert violation(found.plan, rows, columns) < 1e-6
            pair_sums = found.row_potential[:, None] + found.column_potential
            assert (pair_sums <= cost + 1e-5).all()
            seen.append(float(found.value) - best)
        assert seen[0] > 2 * seen[1] > 4 * seen[2]
    assert gaps["last"][-1] < gaps["uniform"][-1] < 0.01


@pytest.mark.full
def test_forty_points_improve_as_in_the_table_of_the_specification() -> None:
    cost, rows, columns = random_problem(40, 40)
    best = optimum(cost, rows, columns)
    solved = lambda steps, average: transport(cost, rows, columns, steps, average=average)
    gap = lambda steps, average: float(solved(steps, average).value) - best
    early, late = gap(100, "uniform"), gap(1000, "uniform")
    assert late < 0.4 * early
    assert gap(100, "last") < early
    assert gap(1000, "last") < late < 0.02
    # The bound: sum eta <C, P_t - P*> <= delta + sum eta^2 / 2, before rounding, B = 1.
    delta = np.abs(np.log(rows)).max() + np.abs(np.log(columns)).max()
    rates = np.sqrt(delta / np.arange(1, 1001))
    bound = (delta + np.sum(rates**2) / 2) / rates.sum()
    mean = solve(cost, rows, columns, 1000, average="weighted").mean
    assert np.sum(cost * mean) - best <= bound


@settings(max_examples=15, deadline=None)
@given(shape=st.sampled_from([(1, 1), (1, 6), (5, 1), (6, 4)]), seed=st.integers(0, 999))
def test_rounding_is_feasible_and_moves_little(shape: tuple[int, int], seed: int) -> None:
    (n, m), rng = shape, np.random.default_rng(seed)
    _, rows, columns = random_problem(n, m, seed)
    plan = np.outer(rows, columns) * rng.lognormal(size=(n, m)) ** 0.3
    found = np.asarray(rounded(plan, rows, columns), np.float64)
    assert (found >= 0).all()
    assert violation(found, rows, columns) < 1e-6
    off = np.abs(plan.sum(1) - rows).sum() + np.abs(plan.sum(0) - columns).sum()
    assert np.abs(found - plan).sum() <= 2 * off + 1e-6


def test_rounding_a_coupling_and_rounding_nothing() -> None:
    coupling = np.outer(ROWS, COLUMNS)
    for plan in (coupling, np.zeros((2, 2))):
        np.testing.assert_allclose(rounded(plan, ROWS, COLUMNS), coupling, atol=1e-6)
    assert np.isnan(rounded(np.full((2, 2), np.nan), ROWS, COLUMNS)).all()


def test_masked_cells_stay_empty_and_marginals_are_right() -> None:
    cost, _, _ = random_problem(12, 12)
    rows, mask = np.full(12, 1 / 12), random_mask(12)
    best = optimum(cost, rows, rows, mask)
    assert best > optimum(cost, rows, rows) + 1e-3
    values = []
    for steps in (100, 2000):
        found = transport(cost, rows, rows, steps, mask=mask)
        assert not np.asarray(found.plan)[~mask].any()
        assert violation(found.plan, rows, rows) < 1e-5
        assert float(found.lower_bound) <= best + 1e-5
        values.append(float(found.value))
    assert best - 1e-5 <= values[1] < best + 0.01
    assert values[1] < values[0]


@pytest.mark.slow
def test_partial_transport_moves_the_cheapest_part() -> None:
    cost, rows, columns = random_problem(8, 6)
    columns = 1.3 * columns
    problem = with_slack(cost, rows, columns, mass=0.6)
    best = optimum(problem.cost, problem.row_marginal, problem.column_marginal, problem.mask)
    found = transport(**problem._asdict(), steps=3000)
    plan = np.asarray(found.plan)[:-1, :-1]
    assert plan.sum() == pytest.approx(0.6, abs=1e-5)
    assert (plan.sum(1) <= rows + 1e-6).all()
    assert (plan.sum(0) <= columns + 1e-6).all()
    assert best - 1e-5 <= np.sum(cost * plan) < best + 0.01


def test_a_penalty_decides_how_much_moves() -> None:
    cost, rows, columns = random_problem(8, 6)
    columns = 0.8 * columns
    moved = []
    for penalty in (0.02, 0.1, 2.0):
        problem = with_slack(cost, rows, columns, penalty=penalty)
        found = transport(**problem._asdict(), steps=4000)
        plan = np.asarray(found.plan)[:-1, :-1]
        left = np.abs(rows - plan.sum(1)).sum() + np.abs(columns - plan.sum(0)).sum()
        assert np.sum(cost * plan) + penalty * left == pytest.approx(float(found.value), abs=1e-5)
        best = optimum(problem.cost, problem.row_marginal, problem.column_marginal)
        assert best - 1e-5 <= float(found.value) < best + 0.02
        moved.append(plan.sum())
    assert moved == sorted(moved)
    assert moved[2] == pytest.approx(0.8, abs=0.02)


def test_gradients_are_those_of_the_optimum() -> None:
    # Against differences of linear programs, where they exist.
    cost, rows, columns = random_problem(4, 5, 1)
    rng = np.random.default_rng(0)
    way = [rng.normal(size=cost.shape), rng.normal(size=4), rng.normal(size=5)]
    way[1] -= way[1].mean()
    way[2] -= way[2].mean()
    problem, small = (cost, rows, columns), 1e-4
    value = lambda *args: lro.optimal_transport(*args, 6000).value

    @jax.jit
    def slopes_of(args: Any, way: Any) -> Any:
        gradients = jax.grad(value, (0, 1, 2))(*args)
        return gradients, jax.jvp(value, args, way)[1]

    gradients, forward = slopes_of(*(tuple(np.float32(x) for x in xs) for xs in (problem, way)))
    slopes = [float(np.sum(np.asarray(g) * w)) for g, w in zip(gradients, way, strict=True)]
    for i, slope in enumerate(slopes):
        moved = lambda t, i=i: [x + (i == k) * t * way[k] for k, x in enumerate(problem)]
        expected = (optimum(*moved(small)) - optimum(*moved(-small))) / (2 * small)
        assert abs(expected) > 0.2
        assert slope == pytest.approx(expected, abs=0.05)
    assert float(forward) == pytest.approx(sum(slopes), abs=1e-4)
    np.testing.assert_allclose(gradients[0], transport(*problem, 6000).plan, atol=1e-6)


@pytest.mark.slow
def test_batches_by_vmap_with_padding() -> None:
    small, large = random_problem(3, 4, 0), random_problem(5, 4, 1)
    cost = np.stack([np.pad(small[0], ((0, 2), (0, 0))), large[0]])
    rows = np.stack([np.pad(small[1], (0, 2)), large[1]])
    columns = np.stack([small[2], large[2]])
    found = jax.vmap(lambda *problem: transport(*problem, 60))(cost, rows, columns)
    found = jax.tree.map(np.asarray, found)
    for i, problem in enumerate((small, large)):
        alone = transport(*problem, 60)
        np.testing.assert_allclose(found.plan[i, : len(problem[1])], alone.plan, atol=1e-5)
        np.testing.assert_allclose(found.value[i], alone.value, atol=1e-5)
        np.testing.assert_allclose(found.lower_bound[i], alone.lower_bound, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_sharded_over_eight_devices(kind: AxisType) -> None:
    cost, rows, columns = (jnp.asarray(x, jnp.float32) for x in random_problem(16, 6))
    expected = transport(cost, rows, columns, 41).plan
    online = solve(cost, rows, columns, 11).plan
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    with jax.set_mesh(mesh):
        cost, rows = place(cost, "x", None), place(rows, "x")
        columns = place(columns)
        sharded = jax.jit(lambda *args: lro.optimal_transport(*args, 41).plan)
        plan = sharded(cost, rows, columns)
        np.testing.assert_allclose(plan, expected, atol=1e-6)

        def step(state: Any, cost: Any, rows: Any, columns: Any) -> Any:
            return lro.mirror_sinkhorn(rows, columns).update(cost, state)

        init = jax.jit(lambda rows, columns: lro.mirror_sinkhorn(rows, columns).init())
        state = init(rows, columns)
        for _ in range(11):
            state = jax.jit(step)(state, cost, rows, columns)
        read = jax.jit(lambda state, *args: lro.mirror_sinkhorn(*args).plan(state))
        np.testing.assert_allclose(read(state, rows, columns), online, atol=1e-6)
        if kind == AxisType.Explicit:
            assert jax.typeof(state.log_coupling).sharding.spec == PartitionSpec("x", None)


@pytest.mark.combinations(1)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (1, 1), (1, 5), (4, 1)])
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_problems_without_a_choice(shape: tuple[int, int], steps: int) -> None:
    rows, columns = (np.full(k, 1 / max(k, 1)) for k in shape)
    columns = columns * rows.sum()
    found = transport(np.ones(shape), rows, columns, steps)
    np.testing.assert_allclose(found.plan, np.outer(rows, columns), atol=1e-6)
    assert np.isfinite(found.value)
    assert float(found.gap) == pytest.approx(0, abs=1e-5)


def test_nan_costs_are_seen_and_refused_where_they_can_be() -> None:
    bad = np.where(COST == 2, np.nan, COST)
    with pytest.raises(ValueError, match="forbid cells by mask"):
        lro.optimal_transport(bad, ROWS, COLUMNS)
    assert np.isnan(transport(bad, ROWS, COLUMNS, 1000, average="uniform").value)


def test_costs_at_which_kernels_underflow() -> None:
    cost = 1e6 * COST
    found = transport(cost, ROWS, COLUMNS, 5000)
    assert float(found.value) == pytest.approx(4.5e5, rel=1e-3)
    assert float(found.gap) < 1e3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lro.optimal_transport(COST[:1], HALF, HALF), "cost must have shape"),
        (lambda: lro.optimal_transport(COST, HALF, HALF, -1), "steps=-1"),
        (lambda: lro.optimal_transport(COST, 2 * HALF, HALF), "same total"),
        (lambda: lro.optimal_transport(COST, HALF, HALF, average="best"), "average='best'"),
        (lambda: lro.round_to_polytope(COST[:1], HALF, HALF), "plan must have shape"),
        (lambda: lro.round_to_polytope(COST, HALF, HALF, sweeps=-1), "sweeps=-1"),
        (lambda: with_slack(COST, HALF, HALF), "either mass or penalty"),
        (lambda: with_slack(COST, HALF, HALF, mass=0.5, penalty=1.0), "either mass or penalty"),
        (lambda: with_slack(COST, HALF, HALF, mass=1.5), "mass=1.5"),
        (lambda: with_slack(COST, HALF, HALF, penalty=-1.0), "penalty=-1.0"),
    ],
)
def test_bad_arguments_are_refused_where_they_are_given(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
