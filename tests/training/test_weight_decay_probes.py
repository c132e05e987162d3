"""Jacobian norms and curvature, against exact ones; and what scale invariance implies."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax.training import (
    hessian_trace,
    jacobian_norm_sq,
    measurements,
    monitor_weight_decay,
    top_eigenvalue,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 3)).astype(np.float32)
PARAMS = {
    "first": RNG.normal(size=(3, 4)).astype(np.float32),
    "second": RNG.normal(size=(4, 2)).astype(np.float32),
}
EXACT = jax.jit(lambda params, x: jacobian_norm_sq(network, params, x, samples=None))


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


QUADRATIC_PARAMS = {"a": np.ones(2, np.float32), "b": np.ones((2, 2), np.float32)}


def test_the_exact_jacobian_norm_is_that_of_the_whole_jacobian() -> None:
    columns = jax.jit(jax.jacfwd(network))(PARAMS, X)
    expected = sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(columns))
    assert_close(EXACT(PARAMS, X), expected, 100, dtype=np.float32)


def test_the_jacobian_probe_is_unbiased() -> None:
    exact = float(EXACT(PARAMS, X))
    one = lambda key: jacobian_norm_sq(network, PARAMS, X, key=key)
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = np.array(jax.jit(lambda keys: jax.lax.map(one, keys))(keys))
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - exact) < 4 * error
    assert error < 0.02 * exact
    several = jax.jit(lambda key: jacobian_norm_sq(network, PARAMS, X, key=key, samples=500))
    mean = several(jax.random.key(1))
    assert abs(mean - exact) < 5 * draws.std() / 500**0.5


@pytest.mark.slow
def test_the_hessian_trace_is_unbiased_and_exact_on_a_diagonal() -> None:
    matrix = symmetric([5.0, 1.0, 0.5, -2.0, 3.0, 0.1]).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    one = lambda key: hessian_trace(quadratic, QUADRATIC_PARAMS, matrix, key=key)
    draws = np.array(jax.jit(lambda keys: jax.lax.map(one, keys))(keys))
    assert abs(draws.mean() - 7.6) < 4 * draws.std() / len(keys) ** 0.5
    diagonal = np.diag(np.diag(matrix))
    exact = jax.jit(lambda key: hessian_trace(quadratic, QUADRATIC_PARAMS, diagonal, key=key))
    assert_close(exact(keys[0]), np.float32(7.6), 100)


@pytest.mark.parametrize("top", [6.0, -6.0])
def test_the_top_eigenvalue_is_that_of_largest_magnitude(top: float) -> None:
    matrix = symmetric([top, 2.0, 1.0, -3.0, 0.5, 0.1]).astype(np.float32)
    find = lambda matrix: top_eigenvalue(
        quadratic, QUADRATIC_PARAMS, matrix, key=jax.random.key(0), iterations=30
    )
    assert_close(jax.jit(find)(matrix), np.float32(top), 800)


def test_probes_of_a_network_agree_with_its_dense_hessian() -> None:
    loss = lambda w, x: jnp.mean(network({**PARAMS, "first": w}, x) ** 2)
    hessian = jax.jit(jax.hessian(loss))(PARAMS["first"], X)
    hessian = np.asarray(hessian, np.float64).reshape(12, 12)
    eigenvalues = np.linalg.eigvalsh(hessian)

    @jax.jit
    def probes(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        top = top_eigenvalue(loss, w, X, key=jax.random.key(2), iterations=200)
        return top, hessian_trace(loss, w, X, key=jax.random.key(3), samples=3000)

    top, trace = probes(PARAMS["first"])
    np.testing.assert_allclose(top, eigenvalues[np.abs(eigenvalues).argmax()], rtol=1e-3)
    np.testing.assert_allclose(trace, hessian.trace(), atol=5 * np.linalg.norm(hessian) / 39)


def test_a_flat_loss_has_no_curvature() -> None:
    assert top_eigenvalue(lambda w: 0.0 * w.sum(), jnp.ones(3), key=jax.random.key(0)) == 0


def scale_invariant(w: jax.Array) -> jax.Array:
    """A linear layer and a norm, as before every normalisation."""
    y = X @ w.reshape(3, 4)
    y = y / jnp.linalg.norm(y)
    return jnp.sum(jnp.sin(np.arange(20, dtype=np.float32).reshape(5, 4) * y))


def test_gradients_of_a_scale_invariant_loss() -> None:
    w = PARAMS["first"].ravel()
    gradient = jax.jit(jax.grad(scale_invariant))
    g, g3 = np.asarray(gradient(w)), np.asarray(gradient(3 * w))
    assert abs(g @ w) < 1e-5 * np.linalg.norm(g) * np.linalg.norm(w)
    np.testing.assert_allclose(3 * g3, g, rtol=1e-3, atol=1e-5)


def test_at_equal_effective_learning_rates_scale_does_not_matter() -> None:
    seen = []
    for scale in (1.0, 3.0):
        params = {"kernel": scale * PARAMS["first"].ravel()}
        rate = 0.1 * scale**2
        tx = optax.chain(optax.sgd(rate), monitor_weight_decay(learning_rate=rate))

        @jax.jit
        def step(params: Any, state: Any, tx: Any = tx) -> tuple[Any, Any]:
            grads = jax.grad(lambda p: scale_invariant(p["kernel"]))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
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
