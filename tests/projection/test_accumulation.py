"""Gradients accumulated in the subspace."""

from typing import Any

import chex
from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import normal_gradients, orthonormal, run, state_bytes

SHAPE, STEPS, MICRO = (6, 9), 3, 4
BASIS = orthonormal(6, 2)


def _gradients() -> list[Any]:
    return [{**g, "bias": g["kernel"][0]} for g in normal_gradients(SHAPE, STEPS * MICRO)]


def _means(gradients: list[Any]) -> list[Any]:
    groups = [gradients[i : i + MICRO] for i in range(0, len(gradients), MICRO)]
    return [jax.tree.map(lambda *xs: sum(xs) / MICRO, *group) for group in groups]


def _start() -> Any:
    return {"kernel": jnp.ones(SHAPE), "bias": jnp.ones(9)}


@pytest.mark.combinations(1)
@pytest.mark.parametrize("on_refresh", ["keep", "rotate_moments"])
@pytest.mark.parametrize("others", [None, optax.trace(0.9)])
def test_it_is_projecting_the_mean_gradient_while_the_basis_stays(
    on_refresh: Any, others: Any
) -> None:
    make = lambda steps: lro.scale_by_projection(
        optax.scale_by_adam(),
        lro.subspaces.fixed(BASIS),
        side="rows",
        on_refresh=on_refresh,
        non_matrix_transform=others,
        accumulate_steps=steps,
    )
    accumulated = run(make(MICRO), _start(), _gradients())
    expected = run(make(1), _start(), _means(_gradients()))
    chex.assert_trees_all_close(accumulated[-1][0], expected[-1][0], atol=1e-5)
    assert all((x == 0).all() for x in jax.tree.leaves(accumulated[-1][1].accumulated))


def test_in_a_recipe_decay_and_schedule_act_once_for_each_optimizer_step() -> None:
    schedule = optax.linear_schedule(0.2, 0.1, STEPS)
    make = lambda steps: lro.galore(
        schedule,
        subspace=lro.subspaces.fixed(BASIS),
        side="rows",
        weight_decay=0.3,
        accumulate_steps=steps,
    )
    trajectory = run(make(MICRO), _start(), _gradients())
    expected = run(make(1), _start(), _means(_gradients()))
    for i in range(STEPS):
        ours, theirs = trajectory[MICRO * (i + 1) - 1][0], expected[i][0]
        chex.assert_trees_all_close(ours, theirs, atol=1e-5)
        chex.assert_trees_all_equal(trajectory[MICRO * i][0], trajectory[MICRO * i + 2][0])


def test_a_basis_is_found_from_the_first_micro_batch_of_the_step_it_is_due_at() -> None:
    gradients = _gradients()
    tx = lro.scale_by_projection(
        optax.scale_by_adam(), lro.subspaces.svd(2), refresh_every=2, accumulate_steps=MICRO
    )
    states = [state for _, state in run(tx, _start(), gradients)]
    bases = [np.asarray(state.basis["kernel"]) for state in states]
    changed = [i for i in range(1, len(bases)) if (bases[i] != bases[i - 1]).any()]
    assert changed == [2 * MICRO]
    assert [int(s.next_refresh["kernel"]) for s in states[::MICRO]] == [2, 2, 4]
    for i in (0, 2 * MICRO):
        u = np.linalg.svd(gradients[i]["kernel"])[0][:, :2]
        np.testing.assert_allclose(bases[i] @ bases[i].T, u @ u.T, atol=1e-5)


def test_with_a_basis_that_turns_the_sum_is_that_of_projections_in_one_basis() -> None:
    gradients = _gradients()[:MICRO]
    tx = lro.scale_by_projection(optax.identity(), lro.subspaces.svd(2), accumulate_steps=MICRO)
    params, state = run(tx, _start(), gradients)[-1]
    basis = state.basis["kernel"]
    mean = sum(g["kernel"] for g in gradients) / MICRO
    np.testing.assert_allclose(params["kernel"] - 1, basis @ basis.T @ mean, atol=1e-5)


def test_the_sum_has_the_size_of_the_projection() -> None:
    params = {"kernel": jnp.zeros((64, 256), jnp.bfloat16), "stack": jnp.zeros((3, 64, 32))}
    spec = {"kernel": lro.WeightDimensionNumbers(0, 1), "stack": lro.WeightDimensionNumbers(1, 2)}
    tx = lro.galore(0.1, rank=8, accumulate_steps=2, weight_dimension_numbers=spec)
    state = jax.eval_shape(tx.init, params)[0]
    assert state_bytes(state.accumulated) == 4 * (8 * 256 + 3 * 64 * 8)
    assert state_bytes(state.accumulated) == state_bytes(state.inner.mu)


def test_accumulated_bfloat16_gradients_are_summed_in_float32() -> None:
    gradient = {"kernel": jnp.full(SHAPE, 1.0, jnp.bfloat16)}
    tiny = {"kernel": jnp.full(SHAPE, 2.0**-9, jnp.bfloat16)}  # lost beside 1 in bfloat16
    rule = lro.subspaces.fixed(jnp.eye(6))
    tx = lro.scale_by_projection(optax.identity(), rule, side="rows", accumulate_steps=3)
    _, state = tx.update(gradient, tx.init(gradient))
    updates, state = tx.update(tiny, state)
    assert_close(state.accumulated["kernel"], 1 + 2.0**-9, dtype=np.float32)
    assert updates["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("residual", ["fira", "gradient_scaling", "error_feedback", "raw", "sign"])
def test_a_residual_rule_that_needs_whole_gradients_is_refused(residual: Any) -> None:
    with pytest.raises(ValueError, match=r"accumulate_steps=2 adds up projected gradients"):
        lro.scale_by_projection(
            optax.identity(), lro.subspaces.svd(2), residual=residual, accumulate_steps=2
        )


@pytest.mark.parametrize("steps", [0, 1.5])
def test_a_number_of_steps_that_is_none_is_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match=f"accumulate_steps={steps}"):
        lro.scale_by_projection(optax.identity(), lro.subspaces.svd(2), accumulate_steps=steps)
