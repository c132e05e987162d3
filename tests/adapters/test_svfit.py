"""SVFit against NumPy in float64, and what the specification says must hold."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import Arrays, parameter_count
from lowrank_optax.adapters.operands import Rows
from tests.adapters.compiled import compiled, gradient, layer_output, times

SVFit = compiled(lro.adapters.SVFit)
KEY = jax.random.key(0)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def initial(method: Any, weights: np.ndarray) -> tuple[Any, list[Arrays]]:
    """The parameters of a stack and those of each layer."""
    params = method.init(KEY, weights)
    return params, [method.layer_arrays(params, i) for i in range(len(weights))]


def output(method: Any, p: Arrays, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return layer_output(method, p, Rows(x), times(x, weight), weight=weight)


def residual_form(w: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The paper's weight: ``W_e`` and the leading components with other singular values."""
    u, values, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    r = len(s)
    rest = w - (u[:, :r] * values[:r]) @ vt[:r]
    return rest + (u[:, :r] * s) @ vt[:r]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_starts_as_the_model_bit_for_bit(dtype: str) -> None:
    weights, x = (z.astype(jnp.dtype(dtype)) for z in (normal(0, 2, 8, 5), normal(1, 4, 8)))
    method = SVFit(rank=3)
    params, layers = initial(method, weights)
    assert params.base is None
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    for w, p in zip(weights, layers, strict=True):
        y = output(method, p, x, w)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, times(x, w))


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_is_the_papers_residual_form(shape: tuple[int, int]) -> None:
    w, x, t = normal(2, 1, *shape), normal(3, 4, shape[0]), normal(4, 3)
    method = SVFit(rank=3)
    _, (p,) = initial(method, w)
    s = np.linalg.svd(w[0].astype(np.float64), compute_uv=False)[:3]
    np.testing.assert_allclose(residual_form(w[0], s), w[0], atol=1e-12)
    expected = residual_form(w[0], s + t)
    p = p | {"t": t}
    np.testing.assert_allclose(output(method, p, x, w[0]), x @ expected, atol=2e-5)
    merged = method.merged(p, w[0])
    np.testing.assert_allclose(merged.weight, expected, atol=1e-5)
    np.testing.assert_allclose(method.unmerged(p, merged.weight), w[0], atol=1e-6)


def test_the_gradient_is_the_diagonal_of_the_weights_in_the_singular_bases() -> None:
    w, x, g = normal(5, 1, 8, 5), normal(6, 4, 8), normal(7, 4, 5)
    method = SVFit(rank=4)
    _, (p,) = initial(method, w)
    d = x.T.astype(np.float64) @ g
    u, _, vt = np.linalg.svd(w[0].astype(np.float64))
    loss = lambda t: jnp.sum(g * output(method, p | {"t": t}, x, w[0]))
    slope = jax.jit(jax.grad(loss))
    for t in (p["t"], normal(8, 4)):  # it does not depend on t
        np.testing.assert_allclose(slope(t), np.diag(u.T @ d @ vt.T)[:4], atol=1e-4)


def test_the_change_is_diagonal_in_the_singular_bases_and_as_large_as_t() -> None:
    w, t = normal(9, 1, 6, 9), normal(10, 4)
    method = SVFit(rank=4)
    _, (p,) = initial(method, w)
    change = np.asarray(method.delta(p | {"t": t}, w[0]), np.float64)
    u, _, vt = np.linalg.svd(w[0].astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(u.T @ change @ vt.T, np.diag([*t, 0, 0]), atol=1e-5)
    assert_close(np.linalg.norm(change), np.linalg.norm(t), 100)
    assert np.linalg.matrix_rank(change, tol=1e-4) == 4


@pytest.mark.parametrize("rank", [5, 50])
def test_with_every_singular_value_they_are_the_new_ones(rank: int) -> None:
    """The plain form of SVFT; larger ranks are clipped."""
    w, t = normal(11, 1, 5, 8), 2 * normal(12, 5)
    method = SVFit(rank=rank)
    params, (p,) = initial(method, w)
    assert params.trainable["t"].shape == (1, 5)
    new = w[0] + method.delta(p | {"t": t}, w[0])
    u, s, vt = np.linalg.svd(w[0].astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(new, w[0] + u @ np.diag(t) @ vt, atol=1e-5)  # SVFT: U (S + M) Vᵀ
    found = np.linalg.svd(np.asarray(new, np.float64), compute_uv=False)
    np.testing.assert_allclose(found, np.sort(np.abs(s + t))[::-1], atol=1e-5)


def test_turning_inputs_and_weight_together_changes_no_step() -> None:
    w, x, goal = normal(13, 1, 6, 5), normal(14, 20, 6), normal(15, 20, 5)
    turn = np.linalg.qr(normal(16, 6, 6).astype(np.float64))[0].astype(np.float32)
    method, ends = SVFit(rank=3), []

    @jax.jit
    @jax.grad
    def slope(t: jax.Array, p: Arrays, inputs: np.ndarray, weight: np.ndarray) -> jax.Array:
        y = layer_output(method.method, p | {"t": t}, Rows(inputs), inputs @ weight, weight=weight)
        return jnp.mean((y - goal) ** 2)

    for inputs, weight in ((x, w), (x @ turn, turn.T @ w)):
        _, (p,) = initial(method, weight)
        t = p["t"]
        for _ in range(3):
            t = t - 0.5 * np.asarray(slope(t, p, inputs, weight[0]))
        ends.append(t)
    assert np.abs(ends[0]).max() > 0.05
    np.testing.assert_allclose(*ends, atol=1e-5)


def test_a_step_of_sgd_is_a_projection_of_the_gradient() -> None:
    w, d, rate = normal(17, 1, 7, 6), normal(18, 7, 6), 0.3
    method = SVFit(rank=4)
    _, (p,) = initial(method, w)
    slope = gradient(lambda t: jnp.sum(d * method.delta(p | {"t": t}, w[0])), p["t"])
    step = np.asarray(method.delta(p | {"t": -rate * slope}, w[0]), np.float64)
    u, _, vt = np.linalg.svd(w[0].astype(np.float64))
    terms = [u[:, i] @ d @ vt[i] * np.outer(u[:, i], vt[i]) for i in range(4)]
    np.testing.assert_allclose(step, -rate * sum(terms), atol=1e-5)
    assert np.linalg.norm(step) <= rate * np.linalg.norm(d)


def test_converts_to_a_lora_exactly() -> None:
    w = normal(19, 2, 6, 5)
    method = SVFit(rank=2)
    params, _ = initial(method, w)
    params = params._replace(trainable={"t": normal(20, 2, 2)})
    for i, change in enumerate(method.deltas(params, w)):
        first, second = method.to_lora(method.layer_arrays(params, i))
        assert (first.shape, second.shape) == ((6, 2), (2, 5))
        np.testing.assert_allclose(first @ second, change, atol=1e-6)


def test_the_worked_example() -> None:
    w = np.diag([3.0, 1.0]).astype(np.float32)[None]
    method = SVFit(rank=1)
    params, (p,) = initial(method, w)
    np.testing.assert_allclose(np.abs(params.frozen["U"][0]), [[1], [0]], atol=1e-7)
    d = np.array([[2, 5], [5, 7]], np.float32)
    slope = gradient(lambda t: jnp.sum(d * method.delta(p | {"t": t}, w[0])), p["t"])
    assert_close(slope, [2.0])
    new = method.merged(p | {"t": -0.5 * slope}, w[0]).weight
    np.testing.assert_allclose(new, np.diag([2.0, 1.0]), atol=1e-6)


def test_the_energy_rank_is_the_smallest_that_holds_the_fraction() -> None:
    energy_rank = lro.adapters.energy_rank
    s = jnp.array([10.0, 1.0, 1.0])
    assert int(energy_rank(s, 0.99)) == 2
    assert [int(energy_rank(s, e)) for e in (0.5, 0.98, 0.9902, 1.0)] == [1, 1, 3, 3]
    assert energy_rank(jnp.stack([s, s]), 0.99).tolist() == [2, 2]
    assert int(energy_rank(1e30 * s, 0.99)) == 2  # squares beyond float32
    assert energy_rank(jnp.array([[2.0, 0.0], [0.0, 0.0]]), 1.0).tolist() == [1, 1]
    for energy in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"energy={energy}"):
            energy_rank(s, energy)


@pytest.mark.slow
def test_each_layer_has_the_rank_of_its_energy() -> None:
    flat, steep = np.diag([1.0, 1, 1, 1]), np.diag([10.0, 1, 1, 0.1])
    weights = np.stack([steep, flat, np.zeros((4, 4))]).astype(np.float32)
    eager = lambda **options: lro.adapters.SVFit(**options).init(KEY, weights)
    params = eager(energy=0.99)
    assert params.trainable["t"].shape == (3, 4)
    counts = (np.abs(params.frozen["U"]).max(1) > 0).sum(1)
    assert counts.tolist() == [2, 4, 0]  # nothing to train of a weight that is zero
    randomized = eager(energy=0.5, power_iterations=3)
    assert randomized.trainable["t"].shape == (3, 2)
    traced = jax.jit(lambda w: lro.adapters.SVFit(energy=0.5).init(KEY, w))(weights)
    used = (np.abs(traced.frozen["U"]).max(1) > 0).tolist()
    assert used == [[True, False, False, False], [True, True, False, False], [False] * 4]


def test_what_is_masked_does_not_move() -> None:
    """Beyond a layer's own rank, and where singular values are zero."""
    deficient = np.outer(normal(0, 6), normal(1, 5))
    weights = np.stack([deficient, normal(2, 6, 5)])
    method = SVFit(rank=(3, 1))
    _, layers = initial(method, weights)
    loss = lambda t, p: jnp.sum((normal(3, 6, 5) - method.delta(p | {"t": t}, weights[0])) ** 2)
    for p in layers:
        slope = gradient(loss, np.ones(3, np.float32), p)
        assert abs(float(slope[0])) > 1e-3
        np.testing.assert_array_equal(slope[1:], 0)
    with pytest.raises(ValueError, match=r"rank=\(3, 1\) has 2 ranks"):
        method.init(KEY, weights[:1])


def test_a_weight_has_as_many_trained_numbers_as_its_rank() -> None:
    params, _ = initial(SVFit(rank=4), normal(0, 3, 9, 7))
    assert parameter_count(params.trainable) == 3 * 4
    assert parameter_count(params.frozen) == 3 * 4 * (9 + 7)


def test_backward_keeps_the_rank_and_not_the_width_of_each_token() -> None:
    tokens, width, rank = 40, 24, 3
    w, x = normal(0, 1, width, width), normal(1, tokens, width)
    method = SVFit(rank=rank)
    _, (p,) = initial(method, w)
    forward = lambda t: layer_output(
        method.method, p | {"t": t}, Rows(x), np.zeros((tokens, width), np.float32), weight=w[0]
    )
    kept = jax.eval_shape(lambda t: jax.vjp(forward, t)[1], p["t"])
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    assert (tokens, rank) in shapes
    assert (tokens, width) not in shapes


def test_bad_options_are_refused_by_name() -> None:
    for options, message in (
        ({"alpha": 2.0}, "alpha=2.0 must be None"),
        ({"energy": 0.0}, "energy=0.0"),
        ({"energy": 1.1}, "energy=1.1"),
        ({"power_iterations": -2}, "power_iterations=-2"),
        ({"rank": 0}, "rank=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SVFit(**options)
