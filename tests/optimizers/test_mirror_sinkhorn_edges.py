"""`mirror_sinkhorn` at the edge of what is allowed, and what is refused."""

from typing import Any

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
    random_problem,
    solve,
    violation,
)
import pytest

import lowrank_optax as lro
from lowrank_optax.optimizers import minimize_over_couplings


@pytest.mark.parametrize("average", ["uniform", "suffix"])
def test_the_state_keeps_its_types_and_can_be_donated(average: Any) -> None:
    cost, rows, columns = random_problem(6, 4)
    solver = lro.mirror_sinkhorn(rows, columns, average=average)
    update = jax.jit(solver.update, donate_argnums=1)
    state = solver.init()
    for gradient in (cost, jnp.asarray(cost, jnp.bfloat16)):
        new = update(gradient, state)
        assert all(x.is_deleted() for x in jax.tree.leaves(state))
        assert [jax.typeof(x) for x in jax.tree.leaves(new)] == [
            jax.typeof(x) for x in jax.tree.leaves(solver.init())
        ]
        state = new


def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was() -> None:
    cost, rows, columns = random_problem(6, 4)
    solver = lro.mirror_sinkhorn(rows, columns)
    update = jax.jit(solver.update)
    state = update(cost, solver.init())
    for bad in (np.nan, np.inf, -np.inf):
        poisoned = cost.copy()
        poisoned[1, 2] = bad
        after = update(poisoned, state)
        jax.tree.map(np.testing.assert_array_equal, after, state)
        assert int(after.count) == 1


def test_marginals_of_any_total() -> None:
    plans = [
        np.asarray(solve(COST, s * ROWS, s * COLUMNS, 100, average="last").plan)
        for s in (1.0, 250.0)
    ]
    np.testing.assert_allclose(250 * plans[0], plans[1], rtol=1e-4, atol=1e-4)
    assert violation(plans[1], 250 * ROWS, 250 * COLUMNS) < 1e-4


def test_rows_without_mass_are_left_out() -> None:
    cost, rows, columns = random_problem(4, 3)
    padded_cost = np.pad(cost, ((0, 2), (0, 1)), constant_values=np.nan)
    expected = solve(cost, rows, columns, 30).plan
    plan = np.asarray(solve(padded_cost, np.pad(rows, (0, 2)), np.pad(columns, (0, 1)), 30).plan)
    np.testing.assert_allclose(plan[:4, :3], expected, atol=1e-6)
    assert not plan[4:].any()
    assert not plan[:, 3:].any()


@pytest.mark.parametrize(
    ("shape", "first"), [((1, 1), "columns"), ((1, 4), "rows"), ((4, 1), "columns")]
)
def test_a_single_row_or_column_leaves_no_choice(shape: tuple[int, int], first: Any) -> None:
    cost, rows, columns = random_problem(*shape)
    plan = solve(cost, rows, columns, 3, first=first).plan
    np.testing.assert_allclose(plan, np.outer(rows, columns), atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_empty_problems(shape: tuple[int, int]) -> None:
    found = solve(np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[1]), 3)
    assert found.plan.shape == shape
    assert not np.asarray(found.plan).any()
    assert int(found.state.count) == 3


def test_it_starts_from_a_given_coupling() -> None:
    solver = lro.mirror_sinkhorn(ROWS, COLUMNS)
    late = solve(COST, ROWS, COLUMNS, 10)
    warm = jax.jit(solver.init)(late.coupling)
    np.testing.assert_allclose(warm.log_coupling, late.state.log_coupling, atol=1e-5)
    assert int(warm.count) == 0


def test_float64_marginals_make_a_float64_state() -> None:
    start = lambda: lro.mirror_sinkhorn(ROWS, COLUMNS).init().log_coupling
    with jax.enable_x64(True):
        assert jax.eval_shape(lambda: start()).dtype == jnp.float64
    assert jax.eval_shape(start).dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(row_marginal=[[0.5, 0.5]]), "row_marginal must be a vector"),
        (dict(row_marginal=[1.2, -0.2]), "row_marginal must be finite and not negative"),
        (dict(column_marginal=[np.nan, 0.5]), "column_marginal must be finite"),
        (dict(row_marginal=[1.0, 1.0]), "must have the same total"),
        (dict(mask=np.ones((2, 3), bool)), "mask must have shape"),
        (dict(mask=[[True, True], [False, False]]), "in row 1"),
        (dict(mask=[[True, False], [True, False]]), "in column 1"),
        (dict(average="mean"), "average='mean'"),
        (dict(first="both"), "first='both'"),
        (dict(bound=-1.0), "bound=-1.0"),
        (dict(bound=1.0, learning_rate=0.1), "give bound or learning_rate"),
    ],
)
def test_bad_arguments_are_refused_where_they_are_given(arguments: Any, message: str) -> None:
    given = {"row_marginal": HALF, "column_marginal": HALF} | arguments
    with pytest.raises(ValueError, match=message):
        lro.mirror_sinkhorn(**given)


def test_shapes_are_checked_at_every_step() -> None:
    solver = lro.mirror_sinkhorn(HALF, HALF)
    with pytest.raises(ValueError, match="gradient must have shape"):
        solver.update(np.zeros((2, 3)), solver.init())
    with pytest.raises(ValueError, match="coupling must have shape"):
        solver.init(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="steps=-1"):
        minimize_over_couplings(solver, constant(SWAP), -1)
