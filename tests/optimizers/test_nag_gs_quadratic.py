"""NAG-GS on quadratics: the closed forms against eigenvalues, minimisers and simulations."""

from typing import Any

from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.optimizers import nag_gs_stationary_variance

POSITIVE = st.floats(0.01, 100.0)


def radius(alpha: float, mu: float, gamma: float, eigenvalues: Any) -> float:
    """The spectral radius of a step on (x, v), built from the equations of the integrator."""
    largest = 0.0
    for curvature in np.atleast_1d(eigenvalues):
        # x' - x = alpha (v - x');  v' - v = alpha ((mu / gamma) (x' - v') - curvature x' / gamma)
        new = np.array([[1 + alpha, 0], [alpha * (curvature - mu) / gamma, 1 + alpha * mu / gamma]])
        old = np.array([[1, alpha], [0, 1]])
        step = np.linalg.solve(new, old)
        largest = max(largest, float(np.max(np.abs(np.linalg.eigvals(step)))))
    return largest


def test_the_references_problem_has_its_steps_and_radius() -> None:
    best = lro.nag_gs_quadratic(mu=1.0, L=9.0, gamma=1.0)
    assert best.learning_rate == 1.0
    assert best.spectral_radius == 0.5
    assert best.critical_learning_rate == pytest.approx(1.0938364, abs=1e-7)
    assert lro.to_heavy_ball(1.0, 1.0, 1.0) == (0.25, 0.25)


@pytest.mark.parametrize(("alpha", "converges"), [(1.09, True), (1.10, False)])
def test_the_optimizer_itself_turns_from_converging_to_diverging(
    alpha: float, converges: bool
) -> None:
    tx, curvature = lro.nag_gs(alpha), jnp.array([1.0, 9.0])

    def body(carry: Any, _: None) -> tuple[Any, None]:
        x, state = carry
        updates, state = tx.update(curvature * x, state)
        return (x + updates, state), None

    start = (jnp.ones(2), tx.init(jnp.ones(2)))
    (x, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, length=1000))(start)
    size = float(jnp.abs(x).max())
    assert size < 0.1 if converges else size > 10


def test_at_the_best_step_the_optimizer_converges_by_the_spectral_radius() -> None:
    best = lro.nag_gs_quadratic(mu=1.0, L=100.0, gamma=2.0)
    tx = lro.nag_gs(best.learning_rate, 1.0, 2.0, constant_gamma=True)
    curvature = jnp.array([1.0, 100.0])

    def body(carry: Any, _: None) -> tuple[Any, jax.Array]:
        x, state = carry
        updates, state = tx.update(curvature * x, state)
        return (x + updates, state), jnp.linalg.norm(x)

    start = (jnp.ones(2), tx.init(jnp.ones(2)))
    _, sizes = jax.jit(lambda c: jax.lax.scan(body, c, length=120))(start)
    measured = (sizes[100] / sizes[60]) ** (1 / 40)
    assert float(measured) == pytest.approx(best.spectral_radius, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(mu=POSITIVE, kappa=st.floats(1.05, 1e4), gamma=POSITIVE)
def test_no_other_step_is_better_and_the_critical_one_has_radius_one(
    mu: float, kappa: float, gamma: float
) -> None:
    largest, ends = mu * kappa, [mu, mu * kappa]
    best = lro.nag_gs_quadratic(mu, largest, gamma)
    at = lambda alpha, over=ends: radius(alpha, mu, gamma, over)
    # Where two eigenvalues meet, rounding moves them by the root of its size.
    assert at(best.learning_rate) == pytest.approx(best.spectral_radius, abs=1e-6)
    inside = np.geomspace(mu, largest, 9)
    assert at(best.learning_rate, inside) <= best.spectral_radius + 1e-6
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert at(factor * best.learning_rate) >= best.spectral_radius - 1e-6
    if np.isfinite(best.critical_learning_rate):
        assert at(best.critical_learning_rate) == pytest.approx(1, abs=1e-6)
        assert at(1.05 * best.critical_learning_rate) > 1
        assert at(0.95 * best.critical_learning_rate) < 1


@settings(max_examples=60, deadline=None)
@given(mu=POSITIVE, kappa=st.floats(1.05, 1e4), gamma=POSITIVE)
def test_the_papers_step_is_a_little_below_and_its_critical_step_the_same(
    mu: float, kappa: float, gamma: float
) -> None:
    largest = mu * kappa
    best = lro.nag_gs_quadratic(mu, largest, gamma)
    paper = (mu + gamma + 2 * np.sqrt(gamma * largest)) / (largest - mu)
    assert paper <= best.learning_rate * (1 + 1e-12)
    q = 1 + paper * min(1, mu / gamma)
    assert radius(paper, mu, gamma, [mu, largest]) == pytest.approx(1 / q, abs=1e-6)
    if kappa > 2:
        root = np.sqrt(mu**2 + gamma**2 - 6 * gamma * mu + 4 * gamma * largest)
        critical = (mu + gamma + root) / (largest - 2 * mu)
        assert best.critical_learning_rate == pytest.approx(critical, rel=1e-9)
    else:
        assert best.critical_learning_rate == np.inf
        assert radius(1e4, mu, gamma, [mu, largest]) < 1


@pytest.mark.parametrize("kappa", [1.5, 4.0, 9.0, 1e4])
def test_gamma_at_mu_is_polyaks_best_heavy_ball(kappa: float) -> None:
    mu, largest = 0.3, 0.3 * kappa
    best = lro.nag_gs_quadratic(mu, largest, gamma=mu)
    root = np.sqrt(kappa)
    assert best.learning_rate == pytest.approx(2 / (root - 1))
    assert best.spectral_radius == pytest.approx((root - 1) / (root + 1))
    if kappa > 2:
        assert best.critical_learning_rate == pytest.approx(2 / (np.sqrt(kappa - 1) - 1))
    rate, momentum = lro.to_heavy_ball(best.learning_rate, mu, mu)
    assert momentum == pytest.approx(((root - 1) / (root + 1)) ** 2)
    assert rate == pytest.approx(4 / (np.sqrt(largest) + np.sqrt(mu)) ** 2)
    for gamma in (0.5 * mu, 2 * mu):
        other = lro.nag_gs_quadratic(mu, largest, gamma)
        assert other.spectral_radius > best.spectral_radius


def test_one_eigenvalue_is_solved_the_faster_the_larger_the_step() -> None:
    assert lro.nag_gs_quadratic(2.0, 2.0, 1.0) == (np.inf, np.inf, 0.0)


def test_the_heavy_balls_long_run_step_and_arrays() -> None:
    alpha, mu, gamma = np.array([0.01, 0.1, 1.0]), 0.3, 1.7
    rate, momentum = lro.to_heavy_ball(alpha, mu, gamma)
    np.testing.assert_allclose(rate / (1 - momentum), alpha / (mu + gamma + alpha * mu))
    traced = jax.jit(lro.to_heavy_ball)(alpha, mu, gamma)
    assert_close(traced.learning_rate, rate)
    rate, momentum = lro.to_heavy_ball(0.1, 1e-4, 1.0)
    assert (round(rate, 4), round(momentum, 3)) == (0.0091, 0.909)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 1, 1), "mu=0"), ((2, 1, 1), "L=1"), ((1, np.inf, 1), "L=inf"), ((1, 2, 0.0), "gamma=0")],
)
def test_arguments_out_of_range_are_refused_by_name(arguments: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        lro.nag_gs_quadratic(*arguments)


# Noise


@pytest.mark.parametrize(
    ("curvature", "alpha", "expected"), [(1, 1, 5 / 27), (3, 1, 5 / 63), (3, 2, 5 / 48)]
)
def test_variance_of_the_papers_noise(curvature: float, alpha: float, expected: float) -> None:
    found = nag_gs_stationary_variance(alpha, 1.0, 1.0, curvature, noise=1.0 / np.sqrt(alpha))
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("alpha", "mu", "gamma", "curvature"), [(1, 1, 1, 3), (0.4, 0.5, 2, 6)])
def test_variance_solves_the_lyapunov_equation_of_the_noisy_integrator(
    alpha: float, mu: float, gamma: float, curvature: float
) -> None:
    """With the paper's noise: sigma times the root of the step, added to v."""
    linalg = pytest.importorskip("scipy.linalg")
    sigma = 0.7
    new = np.array([[1 + alpha, 0], [alpha * (curvature - mu) / gamma, 1 + alpha * mu / gamma]])
    step = np.linalg.solve(new, np.array([[1, alpha], [0, 1.0]]))
    kick = np.linalg.solve(new, np.array([0, sigma * np.sqrt(alpha)]))
    covariance = linalg.solve_discrete_lyapunov(step, np.outer(kick, kick))
    found = nag_gs_stationary_variance(
        alpha, mu, gamma, curvature, noise=gamma * sigma / np.sqrt(alpha)
    )
    assert float(found) == pytest.approx(covariance[0, 0], rel=1e-5)


def test_the_optimizer_has_that_variance_with_noisy_gradients() -> None:
    alpha, mu, gamma, curvature, noise, walkers = 0.8, 0.5, 1.5, 2.0, 0.3, 20_000
    tx = lro.nag_gs(alpha, mu, gamma, constant_gamma=True)
    start = jnp.zeros(walkers)

    def body(carry: Any, key: jax.Array) -> tuple[Any, None]:
        x, state = carry
        gradient = curvature * x + noise * jax.random.normal(key, x.shape)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(x, updates), state), None

    keys = jax.random.split(jax.random.key(0), 60)
    (x, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, keys))((start, tx.init(start)))
    expected = nag_gs_stationary_variance(alpha, mu, gamma, curvature, noise)
    # The spread of a variance of so many walkers is 1 %.
    assert float(x.var()) == pytest.approx(float(expected), rel=0.04)


def test_variance_is_infinite_beyond_the_critical_step() -> None:
    assert np.isinf(nag_gs_stationary_variance(1.2, 1.0, 1.0, 9.0, noise=1.0))
