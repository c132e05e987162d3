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
    run,
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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was(bad: float) -> None:
    cost, rows, columns = random_problem(4, 3)
    solver = lro.mirror_sinkhorn(rows, columns)
    state = solver.update(cost, solver.init())
    poisoned = cost.copy()
    poisoned[1, 2] = bad
    after = jax.jit(solver.update)(poisoned, state)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert int(after.count) == 1


def test_marginals_of_any_total() -> None:
    unit, scaled = (
        lro.mirror_sinkhorn(s * ROWS, s * COLUMNS, average="last") for s in (1.0, 250.0)
    )
    plans = [s.plan(run(s, constant(COST), 100)) for s in (unit, scaled)]
    np.testing.assert_allclose(250 * np.asarray(plans[0]), plans[1], rtol=1e-4, atol=1e-4)
    assert violation(plans[1], 250 * ROWS, 250 * COLUMNS) < 1e-4


def test_rows_without_mass_are_left_out() -> None:
    cost, rows, columns = random_problem(4, 3)
    padded_cost = np.pad(cost, ((0, 2), (0, 1)), constant_values=np.nan)
    small = lro.mirror_sinkhorn(rows, columns)
    large = lro.mirror_sinkhorn(np.pad(rows, (0, 2)), np.pad(columns, (0, 1)))
    expected = small.plan(run(small, constant(cost), 30))
    plan = large.plan(run(large, constant(padded_cost), 30))
    np.testing.assert_allclose(plan[:4, :3], expected, atol=1e-6)
    assert not np.asarray(plan)[4:].any()
    assert not np.asarray(plan)[:, 3:].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1)])
def test_a_single_row_or_column_leaves_no_choice(shape: tuple[int, int]) -> None:
    cost, rows, columns = random_problem(*shape)
    for first in ("columns", "rows"):
        solver = lro.mirror_sinkhorn(rows, columns, first=first)
        state = run(solver, constant(cost), 3)
        np.testing.assert_allclose(solver.plan(state), np.outer(rows, columns), atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_empty_problems(shape: tuple[int, int]) -> None:
    solver = lro.mirror_sinkhorn(np.zeros(shape[0]), np.zeros(shape[1]))
    state = run(solver, constant(np.zeros(shape)), 3)
    assert solver.plan(state).shape == shape
    assert not np.asarray(solver.plan(state)).any()
    assert int(state.count) == 3


def test_it_starts_from_a_given_coupling() -> None:
    solver = lro.mirror_sinkhorn(ROWS, COLUMNS)
    late = run(solver, constant(COST), 50)
    warm = solver.init(solver.coupling(late))
    np.testing.assert_allclose(warm.log_coupling, late.log_coupling, atol=1e-5)
    assert int(warm.count) == 0


def test_float64_marginals_make_a_float64_state() -> None:
    with jax.enable_x64(True):
        state = lro.mirror_sinkhorn(ROWS, COLUMNS).init()
        assert state.log_coupling.dtype == jnp.float64
    assert lro.mirror_sinkhorn(ROWS, COLUMNS).init().log_coupling.dtype == jnp.float32


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
