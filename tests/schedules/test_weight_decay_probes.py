"""Jacobian norms and curvature, against exact ones; and what scale invariance implies."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax.schedules.weight_decay import (
    hessian_trace,
    jacobian_norm_sq,
    measurements,
    monitor_weight_decay,
    top_eigenvalue,
)

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
PARAMS = {
    "first": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
    "second": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32),
}


def network(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["first"]) @ params["second"]


def symmetric(eigenvalues: Any, seed: int = 1) -> np.ndarray:
    n = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return basis @ np.diag(eigenvalues) @ basis.T


def quadratic(params: Any, matrix: jax.Array) -> jax.Array:
    """Its Hessian is the matrix, over both leaves."""
    w = jnp.concatenate([params["a"], params["b"].ravel()])
    return w @ matrix @ w / 2


QUADRATIC_PARAMS = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}


def test_the_exact_jacobian_norm_is_that_of_the_whole_jacobian() -> None:
    columns = jax.jacfwd(network)(PARAMS, X)
    expected = sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(columns))
    actual = jacobian_norm_sq(network, PARAMS, X, samples=None)
    assert_close(actual, expected, 100)


def test_the_jacobian_probe_is_unbiased() -> None:
    exact = float(jacobian_norm_sq(network, PARAMS, X, samples=None))
    one = jax.jit(lambda key: jacobian_norm_sq(network, PARAMS, X, key=key))
    draws = np.array(jax.lax.map(one, jax.random.split(jax.random.key(0), 4000)))
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - exact) < 4 * error
    assert error < 0.02 * exact
    mean = jacobian_norm_sq(network, PARAMS, X, key=jax.random.key(1), samples=500)
    assert abs(mean - exact) < 5 * draws.std() / 500**0.5


def test_the_hessian_trace_is_unbiased_and_exact_on_a_diagonal() -> None:
    matrix = jnp.asarray(symmetric([5.0, 1.0, 0.5, -2.0, 3.0, 0.1]), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    one = lambda key: hessian_trace(quadratic, QUADRATIC_PARAMS, matrix, key=key)
    draws = np.array(jax.jit(lambda keys: jax.lax.map(one, keys))(keys))
    assert abs(draws.mean() - 7.6) < 4 * draws.std() / len(keys) ** 0.5
    diagonal = jnp.diag(jnp.diag(matrix))
    trace = hessian_trace(quadratic, QUADRATIC_PARAMS, diagonal, key=keys[0])
    assert_close(trace, 7.6, 100)


@pytest.mark.parametrize("top", [6.0, -6.0])
def test_the_top_eigenvalue_is_that_of_largest_magnitude(top: float) -> None:
    matrix = jnp.asarray(symmetric([top, 2.0, 1.0, -3.0, 0.5, 0.1]), jnp.float32)
    found = top_eigenvalue(
        quadratic, QUADRATIC_PARAMS, matrix, key=jax.random.key(0), iterations=30
    )
    assert_close(found, top, 800)


def test_probes_of_a_network_agree_with_its_dense_hessian() -> None:
    loss = lambda w, x: jnp.mean(network({**PARAMS, "first": w}, x) ** 2)
    hessian = np.asarray(jax.hessian(loss)(PARAMS["first"], X), np.float64).reshape(12, 12)
    eigenvalues = np.linalg.eigvalsh(hessian)
    top = top_eigenvalue(loss, PARAMS["first"], X, key=jax.random.key(2), iterations=200)
    np.testing.assert_allclose(top, eigenvalues[np.abs(eigenvalues).argmax()], rtol=1e-3)
    trace = hessian_trace(loss, PARAMS["first"], X, key=jax.random.key(3), samples=3000)
    np.testing.assert_allclose(trace, hessian.trace(), atol=5 * np.linalg.norm(hessian) / 39)


def test_a_flat_loss_has_no_curvature() -> None:
    assert top_eigenvalue(lambda w: 0.0 * w.sum(), jnp.ones(3), key=jax.random.key(0)) == 0


def scale_invariant(w: jax.Array) -> jax.Array:
    """A linear layer and a norm, as before every normalisation."""
    y = X @ w.reshape(3, 4)
    y = y / jnp.linalg.norm(y)
    return jnp.sum(jnp.sin(jnp.arange(20.0).reshape(5, 4) * y))


def test_gradients_of_a_scale_invariant_loss() -> None:
    w = PARAMS["first"].ravel()
    g, g3 = jax.grad(scale_invariant)(w), jax.grad(scale_invariant)(3 * w)
    assert abs(g @ w) < 1e-5 * jnp.linalg.norm(g) * jnp.linalg.norm(w)
    np.testing.assert_allclose(3 * g3, g, rtol=1e-3, atol=1e-5)


def test_at_equal_effective_learning_rates_scale_does_not_matter() -> None:
    seen = []
    for scale in (1.0, 3.0):
        params = {"kernel": scale * PARAMS["first"].ravel()}
        rate = 0.1 * scale**2
        tx = optax.chain(optax.sgd(rate), monitor_weight_decay(learning_rate=rate))
        state = tx.init(params)
        for _ in range(3):
            grads = jax.grad(lambda p: scale_invariant(p["kernel"]))(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        numbers = measurements(state)["all"]
        seen.append([numbers["effective_learning_rate"], numbers["rotation"]])
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-3)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="needs a key"):
        jacobian_norm_sq(network, PARAMS, X)
    with pytest.raises(ValueError, match="samples=0"):
        jacobian_norm_sq(network, PARAMS, X, key=jax.random.key(0), samples=0)
    with pytest.raises(ValueError, match="iterations=0"):
        top_eigenvalue(lambda w: w.sum(), jnp.ones(2), key=jax.random.key(0), iterations=0)
