"""`optimal_transport` against other libraries, where they are installed."""

import jax.numpy as jnp
from optimizers.transport_problems import random_problem
import pytest

import lowrank_optax as lro


def test_python_optimal_transport_agrees() -> None:
    ot = pytest.importorskip("ot")
    cost, rows, columns = random_problem(15, 12)
    found = lro.optimal_transport(cost, rows, columns, 4000)
    exact = float(ot.emd2(rows, columns, cost))
    assert exact - 1e-6 <= float(found.value) < exact + 5e-3
    assert exact - 5e-3 < float(found.lower_bound) <= exact + 1e-6


def test_ott_agrees_at_a_small_epsilon() -> None:
    linear = pytest.importorskip("ott.solvers.linear")
    geometry = pytest.importorskip("ott.geometry.geometry")
    cost, rows, columns = (jnp.asarray(x, jnp.float32) for x in random_problem(15, 12))
    out = linear.solve(geometry.Geometry(cost, epsilon=1e-3), rows, columns, max_iterations=20_000)
    plan = lro.round_to_polytope(out.matrix, rows, columns)
    found = lro.optimal_transport(cost, rows, columns, 4000)
    assert float(found.value) == pytest.approx(float(jnp.sum(cost * plan)), abs=5e-3)
