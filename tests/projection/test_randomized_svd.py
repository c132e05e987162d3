"""How close the randomized rule comes to the exact one, and what a warm start is worth."""

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.projection.rules import AXES, Case, case, decaying, normal


def _captured(one: Case, gradient: jax.Array) -> float:
    return float(np.sum(np.asarray(one.first(gradient).projected, np.float64) ** 2))


@AXES
def test_svd_captures_the_leading_singular_values(axis: int) -> None:
    gradient = normal(12, 9)
    expected = (np.linalg.svd(np.asarray(gradient, np.float64))[1][:4] ** 2).sum()
    captured = _captured(case("svd", (12, 9), axis, 4), gradient)
    assert_close(captured, expected, 100, dtype=np.float32)


@AXES
def test_it_is_exact_when_the_sketch_spans_the_matrix(axis: int) -> None:
    gradient = normal(10, 7)
    cases = [case(name, (10, 7), axis) for name in ("svd", "randomized_svd")]
    exact, randomized = (one.dense(one.found(gradient)) for one in cases)
    np.testing.assert_allclose(exact @ exact.T, randomized @ randomized.T, atol=1e-4)


@AXES
def test_it_orders_its_vectors_as_the_exact_one(axis: int) -> None:
    gradient = decaying(40, 60, power=2.0)
    cases = [case(name, (40, 60), axis, 4) for name in ("svd", "randomized_svd")]
    exact, randomized = (one.dense(one.found(gradient)) for one in cases)
    np.testing.assert_allclose(np.abs(np.diag(exact.T @ randomized)), np.ones(4), atol=1e-3)


@pytest.mark.slow
def test_it_captures_what_the_specification_says() -> None:
    """Singular values 1/i, 768 × 2048, rank 128, 16 further columns: exact 0.9961 of the energy."""
    gradient = decaying(768, 2048)
    view, total = lro.View.of(gradient, -2, 128), float(jnp.sum(gradient**2))
    for power_iterations, expected in ((0, 0.9911), (1, 0.9958), (2, 0.99599)):
        one = Case(lro.subspaces.randomized_svd(128, 16, power_iterations), view)
        captured = _captured(one, gradient) / total
        np.testing.assert_allclose(captured, expected, atol=3e-4)
        assert captured < 0.99611


@pytest.mark.slow
def test_a_warm_start_is_as_good_as_another_power_iteration() -> None:
    gradient, key = decaying(96, 160), jax.random.key(5)
    view = lro.View.of(gradient, -2, 16)
    cold, colder, warm = (
        Case(lro.subspaces.randomized_svd(16, 4, power_iterations, warm_start), view)
        for power_iterations, warm_start in ((0, False), (1, False), (0, True))
    )
    last = cold.found(gradient)
    captured = [
        float(jnp.sum(one.project(one.refresh(key, gradient, last), gradient) ** 2))
        for one in (cold, colder, warm)
    ]
    none, iteration, start = np.array(captured) - captured[0]
    assert none < 0.9 * iteration < start


def test_a_warm_start_begins_with_gaussians_where_there_is_no_last_basis() -> None:
    gradient = normal(8, 10)
    cold, warm = (case(name, (8, 10)) for name in ("randomized_svd", "warm_start"))
    np.testing.assert_allclose(cold.found(gradient), warm.found(gradient), atol=1e-5)
