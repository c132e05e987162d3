"""APOLLO against an independent float64 reference, and what is its own."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.projection.runs import Adam, float64, moved, normal_gradients, run

B1, B2 = 0.9, 0.999


def _reference(
    gradients: list[np.ndarray], bases: list[np.ndarray], scale: float, granularity: str
) -> np.ndarray:
    """The sum of updates before the learning rate, by the official code's order of operations."""
    adam, total, last = Adam(B1, B2), np.zeros_like(gradients[0]), 0.0
    axis = 0 if granularity == "channel" else None
    for t, (g, basis) in enumerate(zip(gradients, bases, strict=True), start=1):
        r = basis.T @ g
        adam.update(r)
        raw = adam.first / (np.sqrt(adam.second) + adam.eps * np.sqrt(1 - B2**t))
        factors = np.linalg.norm(raw, axis=axis) / (np.linalg.norm(r, axis=axis) + 1e-8)
        scaled = g * factors
        norm = np.linalg.norm(scaled)
        if last > 0:
            scaled = scaled / (max(norm / (last + 1e-8), 1.01) / 1.01)
        last = np.linalg.norm(scaled)
        total += np.sqrt(scale) * np.sqrt(1 - B2**t) / (1 - B1**t) * scaled
    return total


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_agrees_with_a_float64_reference_over_several_bases(granularity: Any) -> None:
    weight, expected = _run_and_reference(granularity, np.float32)
    assert_close(weight, expected, 200, dtype=np.float32)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_gradients_of_float64_are_updated_in_float64(granularity: Any) -> None:
    with jax.enable_x64(True):
        weight, expected = _run_and_reference(granularity, np.float64)
    np.testing.assert_allclose(weight, expected, atol=1e-12)


def _run_and_reference(granularity: Any, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The weight after 8 steps and three bases in one dtype, and the reference for these bases."""
    drawn, rank = normal_gradients((6, 9), 8), 2
    gradients = [
        {"kernel": jnp.asarray(dtype(g["kernel"]) * (1 + i) ** 2)} for i, g in enumerate(drawn)
    ]
    tx = lro.apollo(0.1, rank, 3, 4.0, granularity=granularity, seed=3)
    trajectory = run(tx, {"kernel": jnp.zeros((6, 9), dtype)}, gradients)
    rule = lro.subspaces.random(rank)
    view = lro.View.of(jnp.zeros((6, 9), dtype), -2, rank)
    bases = [
        np.asarray(rule.lift(state[0].basis, jnp.eye(rank, dtype=dtype), view), np.float64)
        for _, state in trajectory
    ]
    assert len({int(state[0].basis) for _, state in trajectory}) == 3
    expected = -0.1 * _reference(float64(gradients), bases, 4.0, granularity)
    return np.asarray(trajectory[-1][0]["kernel"]), expected


def test_the_update_has_full_rank() -> None:
    gradient = normal_gradients((6, 9), 1)
    assert np.linalg.matrix_rank(moved(lro.apollo(0.1, 1), (6, 9), gradient)) == 6


def test_mini_is_apollo_of_rank_one_with_one_factor_a_matrix() -> None:
    gradients = normal_gradients((6, 9), 3)
    mini = lro.apollo_mini(0.1, scale=16.0, seed=2)
    same = lro.apollo(0.1, 1, scale=16.0, granularity="tensor", seed=2)
    assert_close(moved(mini, (6, 9), gradients), moved(same, (6, 9), gradients), 100)
    seen = moved(mini, (6, 9), gradients[:1]) / np.asarray(gradients[0]["kernel"])
    assert_close(seen, seen[0, 0], 800)


def test_another_seed_is_another_basis() -> None:
    gradients = normal_gradients((6, 9), 1)
    seeds = [moved(lro.apollo(0.1, 2, seed=seed), (6, 9), gradients) for seed in (0, 1)]
    assert np.abs(seeds[0] - seeds[1]).max() > 1e-3


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_without_a_root_is_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match="scale="):
        lro.apollo(0.1, scale=scale)


def test_leaves_share_one_seed() -> None:
    params = {"a": jnp.zeros((6, 9)), "b": jnp.zeros((9, 6))}
    state = jax.eval_shape(lro.apollo(0.1, 2).init, params)[0]
    assert state.basis.shape == ()
