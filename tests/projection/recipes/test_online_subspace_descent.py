"""Online Subspace Descent against an independent float64 reference."""

import itertools
from typing import Any

import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import Adam, float64, moved, normal_gradients, run

SHAPE, RANK, STEPS = (6, 9), 2, 8


def _reference(gradients: list[np.ndarray], penalty: float, rate: Any, adam: bool) -> np.ndarray:
    """The weight after all gradients, from zeros."""
    inner, outer = Adam(eps=1e-6), Adam(eps=1e-8)
    weight = np.zeros(SHAPE)
    basis = np.linalg.svd(gradients[0])[0][:, :RANK]
    for t, g in enumerate(gradients):
        r, eye = basis.T @ g, np.eye(RANK)
        weight = weight - 0.1 * 0.25 * basis @ inner.update(r)
        if t == 0:
            continue
        a = g / np.linalg.norm(g)
        error, drift = basis @ basis.T @ a - a, basis.T @ basis - eye
        descent = 2 * (error @ a.T @ basis + a @ error.T @ basis) + 4 * penalty * basis @ drift
        now = rate(t) if callable(rate) else rate
        basis = basis - now * (outer.update(descent) if adam else descent)
    return weight


@pytest.mark.parametrize(("penalty", "adam"), [(0.1, True), (0.0, True), (0.3, False)])
def test_agrees_with_a_float64_reference(penalty: float, adam: bool) -> None:
    gradients, rate = normal_gradients(SHAPE, STEPS), 0.02
    moves = optax.adam(rate) if adam else optax.sgd(rate)
    tx = lro.scale_by_projection(
        optax.scale_by_adam(eps=1e-6),
        lro.subspaces.online_pca(RANK, moves, penalty, initial=lro.subspaces.svd(RANK)),
        refresh_every=None,
        scale=0.25,
    )
    tx = optax.chain(tx, optax.scale_by_learning_rate(0.1))
    expected = _reference(float64(gradients), penalty, rate, adam)
    np.testing.assert_allclose(moved(tx, SHAPE, gradients), expected, atol=1e-5)
    how = {"subspace_learning_rate": rate} if adam else {"subspace_optimizer": moves}
    recipe = lro.online_subspace_descent(0.1, RANK, penalty=penalty, **how)
    # Its first basis is found by a sketch, which has all columns here.
    np.testing.assert_allclose(moved(recipe, SHAPE, gradients), expected, atol=2e-4)


def test_with_a_basis_that_does_not_move_it_is_galore_without_refresh() -> None:
    gradients = normal_gradients(SHAPE, 4)
    still = lro.online_subspace_descent(0.1, RANK, subspace_learning_rate=0.0)
    galore = lro.galore(0.1, RANK, refresh_every=None)
    np.testing.assert_allclose(
        moved(still, SHAPE, gradients), moved(galore, SHAPE, gradients), atol=1e-5
    )


def test_a_schedule_of_the_basis_is_of_the_training_step() -> None:
    gradients = normal_gradients(SHAPE, STEPS)
    schedule = lambda count: 0.03 * 0.5**count
    expected = _reference(float64(gradients), 0.1, schedule, adam=True)
    tx = lro.online_subspace_descent(0.1, RANK, schedule)
    np.testing.assert_allclose(moved(tx, SHAPE, gradients), expected, atol=2e-4)
    late = _reference(float64(gradients), 0.1, lambda t: schedule(t - 1), adam=True)
    assert np.abs(late - expected).max() > 2e-3


def test_a_rate_of_zero_moves_no_basis() -> None:
    gradients = normal_gradients(SHAPE, 4)
    schedule = optax.piecewise_constant_schedule(0.05, {2: 0.0})
    tx = lro.online_subspace_descent(0.1, RANK, schedule)
    trajectory = run(tx, {"kernel": np.zeros(SHAPE, np.float32)}, gradients)
    bases = [np.asarray(state[0].basis.basis["kernel"]) for _, state in trajectory]
    moves = [float(np.abs(x - y).max()) for x, y in itertools.pairwise(bases)]
    assert moves[0] > 0.01
    assert moves[1:] == [0.0, 0.0]
