"""Ordered directions: the numbers and theorems of the specification, and sampled ranks."""

import functools
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.layers import Factors, MaestroLinear, maestro
from lowrank_optax.layers.maestro import group_norms, prefix_product, sample_ranks

A, B = np.array([[3.0, 0], [4, 1]]), np.array([[1.0, 2], [2, 0]])
WORKED = Factors(jnp.float32(A), jnp.float32(B))
TARGET = np.array([[3.0, 4, 0], [1, 2, 2]])
COVARIANCES = {
    "identity": (np.eye(2), [5.531860, 1.843510], 1.699265),
    "correlated": (np.array([[2, 0.5], [0.5, 0.3]]), [7.945021, 0.759374], 0.288324),
}


def test_worked_tails_penalty_and_importance() -> None:
    layer = MaestroLinear(2, 2, rngs=nnx.Rngs(0))
    layer.set_factors(WORKED, jnp.array(2))
    tails, plain = group_norms(WORKED), group_norms(WORKED, hierarchical=False)
    np.testing.assert_allclose(tails, [[5.099020, 1], [3, 2]], rtol=1e-6)
    np.testing.assert_allclose(plain, [[5, 1], [2.236068, 2]], rtol=1e-6)
    np.testing.assert_allclose(maestro.penalty(layer), 11.099020, rtol=1e-6)
    np.testing.assert_allclose(maestro.penalty(layer, hierarchical=False), 10.236068, rtol=1e-6)
    found = maestro.importance(layer)[""], maestro.importance(layer, hierarchical=False)[""]
    np.testing.assert_allclose(found, [[15.297059, 2], [11.180340, 2]], rtol=1e-6)


@jax.jit
def objective(factors: Factors, root: jax.Array, target: jax.Array) -> jax.Array:
    """The mean over all prefixes, J, for inputs whose Gram matrix is ``root rootᵀ``."""
    errors = [
        jnp.sum((root.T @ target - prefix_product(root.T, factors, jnp.array(k))) ** 2)
        for k in range(1, len(root) + 1)
    ]
    return sum(errors) / len(root)


def descend(factors: Factors, root: Any, target: Any, steps: int) -> Factors:
    """Gradient descent on J."""

    def step(factors: Factors, _: Any) -> tuple[Factors, None]:
        slope = jax.grad(objective)(factors, root, target)
        return jax.tree.map(lambda x, g: x - 0.02 * g, factors, slope), None

    return jax.jit(lambda factors: jax.lax.scan(step, factors, length=steps)[0])(factors)


@pytest.mark.parametrize("name", COVARIANCES)
def test_the_optimum_of_ordered_dropout_is_the_svd_seen_through_the_data(name: str) -> None:
    """At the closed form J has its known value and no slope, and descent lands on it."""
    covariance, values, least = COVARIANCES[name]
    root = np.linalg.cholesky(covariance)
    u, sigma, vt = np.linalg.svd(root.T @ TARGET, full_matrices=False)
    np.testing.assert_allclose(sigma, values, rtol=1e-6)
    best = [np.linalg.inv(root.T) @ (u[:, :k] * sigma[:k]) @ vt[:k] for k in (1, 2)]
    with jax.enable_x64(True):
        a = np.linalg.inv(root.T) @ (u * np.sqrt(sigma))
        closed = Factors(jnp.asarray(a), jnp.asarray(np.sqrt(sigma)[:, None] * vt))
        value, slope = jax.value_and_grad(objective)(closed, root, TARGET)
        np.testing.assert_allclose(value, least, atol=1e-6)
        np.testing.assert_allclose(np.concatenate([x.ravel() for x in slope]), 0, atol=1e-12)

        rng = np.random.default_rng(1)
        start = Factors(*(jnp.asarray(rng.standard_normal(s)) for s in ((2, 2), (2, 3))))
        a, b = descend(start, root, TARGET, 20_000)
        for k in (1, 2):
            np.testing.assert_allclose(a[:, :k] @ b[:k], best[k - 1], atol=1e-6)
    if name == "correlated":
        known = [[2.886964, 4.017692, 0.505222], [1.392933, 1.938499, 0.243765]]
        np.testing.assert_allclose(best[0], known, atol=1e-6)
    else:  # the spectral start of a layer is the optimum already
        linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        linear.kernel[...] = jnp.asarray(TARGET, jnp.float32)
        factors = MaestroLinear.from_linear(linear).factors()
        np.testing.assert_allclose(
            objective(factors, jnp.eye(2), jnp.float32(TARGET)), least, atol=1e-5
        )


def test_an_autoencoder_finds_the_principal_components() -> None:
    """With the identity as target, prefixes are projectors on leading eigenvectors of the data."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((50, 4)) * [3, 2, 1, 0.5] + [1, 0, 0, 0]  # uncentred
    root = np.linalg.cholesky(x.T @ x / 50)

    with jax.enable_x64(True):
        start = Factors(*(jnp.asarray(0.3 * rng.standard_normal((4, 4))) for _ in "ab"))
        a, b = descend(start, root, np.eye(4), 40_000)
        vectors = np.linalg.eigh(x.T @ x)[1][:, ::-1]
        for k in range(1, 5):
            np.testing.assert_allclose(
                a[:, :k] @ b[:k], vectors[:, :k] @ vectors[:, :k].T, atol=1e-4
            )


def test_masked_prefixes_equal_sliced_ones() -> None:
    rng = np.random.default_rng(3)
    x, a, b = (rng.standard_normal(shape) for shape in ((5, 6), (6, 4), (4, 7)))
    with jax.enable_x64(True):
        factors = Factors(jnp.asarray(a), jnp.asarray(b))
        masked = jax.jit(jax.vmap(lambda k: prefix_product(x, factors, k)))(jnp.arange(-1, 7))
        expected = [x @ a[:, :k] @ b[:k] for k in (0, 0, 1, 2, 3, 4, 4, 4)]  # clipped
        np.testing.assert_allclose(masked, expected, rtol=1e-12, atol=1e-12)
        for k in range(5):
            np.testing.assert_allclose(
                prefix_product(x, factors, k), expected[k + 1], rtol=1e-12, atol=1e-12
            )
    for wrong, message in (
        (-1, "rank=-1 must be from 0 to 4"),
        (5, "rank=5 must be from 0 to 4"),
        (1.5, r"rank=1\.5 must be an integer"),
        (np.arange(4), r"rank has shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            prefix_product(x, factors, wrong)


def test_directions_beyond_the_rank_have_no_gradient_even_where_they_are_nan() -> None:
    rng = np.random.default_rng(4)
    x, a, b = (rng.standard_normal(s, np.float32) for s in ((5, 6), (6, 4), (4, 7)))
    a[:, 3] = np.nan
    loss = lambda factors, k: jnp.sum(prefix_product(x, factors, k) ** 2)
    gradient = jax.jit(jax.grad(loss))
    for k in (0, 2):
        slope = gradient(Factors(jnp.asarray(a), jnp.asarray(b)), jnp.array(k))
        assert not np.any(slope.first[:, k:])
        assert not np.any(slope.second[k:])
        dy = 2 * x @ a[:, :k] @ b[:k]
        assert_close(slope.first[:, :k], x.T @ (dy @ b[:k].T))
        assert_close(slope.second[:k], (x @ a[:, :k]).T @ dy)


@pytest.mark.parametrize("hierarchical", [True, False])
def test_slopes_of_norms_are_those_of_finite_differences_and_zero_at_zero(
    hierarchical: bool,
) -> None:
    rng = np.random.default_rng(5)

    @jax.jit
    def totals(a: jax.Array, b: jax.Array) -> jax.Array:
        of_a, of_b = group_norms(Factors(a, b), hierarchical=hierarchical)
        return jnp.sum(of_a + of_b) + jnp.sum(of_a * of_b)

    gradient = jax.jit(jax.grad(totals, (0, 1)))
    with jax.enable_x64(True):
        a, b = rng.standard_normal((3, 4)), rng.standard_normal((4, 2))
        direction = rng.standard_normal((3, 4)), rng.standard_normal((4, 2))
        slopes = gradient(a, b)
        slope = sum(jnp.vdot(g, d) for g, d in zip(slopes, direction, strict=True))
        h = 1e-6
        ahead, behind = (totals(a + s * direction[0], b + s * direction[1]) for s in (h, -h))
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-8)
    a[:, 2:], b[:] = 0, 0
    slopes = gradient(jnp.float32(a), jnp.float32(b))
    assert all(np.all(np.isfinite(g)) for g in slopes)
    assert not np.any(slopes[0][:, 2:])
    assert not np.any(slopes[1])


def test_importance_never_increases_and_is_summed_in_float32() -> None:
    rng = np.random.default_rng(6)
    scale = 10.0 ** rng.uniform(-6, 2, 300)
    a, b = (rng.standard_normal(s) * scale for s in ((7, 300), (5, 300)))
    norms = group_norms(Factors(jnp.bfloat16(a), jnp.bfloat16(b.T)))
    assert norms[0].dtype == jnp.float32
    found = np.asarray(norms[0] * norms[1], np.float64)
    assert np.all(found[1:] <= found[:-1] * (1 + 2e-7))
    wide = np.float64(jnp.bfloat16(a)), np.float64(jnp.bfloat16(b))
    tails = [np.sqrt(np.cumsum((x**2).sum(0)[::-1])[::-1]) for x in wide]
    np.testing.assert_allclose(found, tails[0] * tails[1], rtol=1e-5)


def test_penalty_does_not_see_rotations_outside_but_mixing_of_directions() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.standard_normal((5, 3)), rng.standard_normal((3, 4))
    rotation = lambda n: np.linalg.qr(rng.standard_normal((n, n)))[0]
    of_a, of_b, mixing = rotation(5), rotation(4), rotation(3)
    norms = jax.jit(group_norms)
    total = lambda a, b: np.sum(norms(Factors(jnp.float32(a), jnp.float32(b))))
    np.testing.assert_allclose(total(of_a @ a, b @ of_b), total(a, b), rtol=1e-6)
    assert abs(total(a @ mixing, mixing.T @ b) - total(a, b)) > 0.1


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5128, 0), (0.5132, 0.342), (1, 0.894253), (2, 1.927981)]
)
def test_plain_penalty_half_thresholds_singular_values(value: float, expected: float) -> None:
    """Balanced factors have the least penalty of a product, and then it is 2 √σ."""
    with jax.enable_x64(True):
        sigma = np.linspace(0, 2.5, 250_001)
        root = jnp.sqrt(jnp.asarray(sigma))
        of_penalty = lambda a, b: sum(
            x[:, 0]
            for x in group_norms(Factors(a[:, None, None], b[:, None, None]), hierarchical=False)
        )
        balanced = of_penalty(root, root)
        np.testing.assert_allclose(balanced, 2 * np.sqrt(sigma), rtol=1e-12)
        assert np.all(of_penalty(root * 1.1, root / 1.1)[1:] > balanced[1:])
        total = 0.5 * (value - sigma) ** 2 + 0.1 * np.asarray(balanced)
    found = sigma[np.argmin(total)]
    np.testing.assert_allclose(found, expected, atol=1e-3 if value < 1 else 2e-5)


RANKS = {"a": 2, "stack": np.array([3, 0]), "b": 5}


@functools.partial(jax.jit, static_argnums=1)
def draws(key: jax.Array, mode: maestro.SamplingMode) -> dict[str, jax.Array]:
    ranks = jax.tree.map(jnp.asarray, RANKS)
    return jax.vmap(lambda key: sample_ranks(key, ranks, mode))(jax.random.split(key, 100_000))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sum((counts - expected) ** 2 / expected))


def test_one_layer_draws_every_pair_of_a_layer_and_a_rank_alike() -> None:
    found = draws(jax.random.key(0), "one_layer")
    assert found["stack"].shape == (100_000, 2)
    assert found["a"].dtype == jnp.int32
    flat = np.concatenate([np.reshape(found[name], (100_000, -1)) for name in RANKS], axis=1)
    full = np.array([2, 3, 0, 5])
    below = flat != full
    assert np.all(below.sum(1) <= 1)
    # A drawn full rank cannot be seen: three of ten pairs change nothing.
    counts = [np.sum(flat[:, i] == k) for i in (0, 1, 3) for k in range(1, full[i])]
    counts = np.array([*counts, np.sum(~below.any(1))])
    assert chi_square(counts, 100_000 * np.array([1] * 7 + [3]) / 10) < 26  # 0.9995 of 7 degrees


def test_independent_draws_are_uniform_and_do_not_know_each_other() -> None:
    found = draws(jax.random.key(1), "independent")
    a, b = np.asarray(found["a"]), np.asarray(found["b"])
    assert not np.any(found["stack"][:, 1])
    table = np.zeros((2, 5))
    np.add.at(table, (a - 1, b - 1), 1)
    assert table.sum() == 100_000
    assert chi_square(table, np.full((2, 5), 10_000.0)) < 30  # 0.9995 of 9 degrees


def test_shuffled_steps_have_every_pair_once() -> None:
    steps = list(maestro.shuffled_ranks(jax.random.key(0), RANKS))
    flat = [tuple(np.concatenate([np.ravel(r[name]) for name in RANKS]).tolist()) for r in steps]
    pairs = [(1, 3, 0, 5), (2, 1, 0, 5), (2, 2, 0, 5), *((2, 3, 0, k) for k in range(1, 5))]
    assert sorted(flat) == sorted([*pairs, *3 * [(2, 3, 0, 5)]])
    assert flat != sorted(flat)


def test_samples_that_cannot_be_are_refused() -> None:
    key = jax.random.key(0)
    for ranks, message in (
        ({"a": 0, "b": np.zeros(3, int)}, "all ranks are 0, so there is nothing to sample"),
        ({"a": 1, "b": -1}, "ranks must not be negative, and those of b are"),
        ({}, "has no layer to sample"),
        ({"a": 1.5}, "the rank of a must be an integer, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_ranks(key, ranks)
        with pytest.raises(ValueError, match=message):
            next(maestro.shuffled_ranks(key, ranks))
    with pytest.raises(ValueError, match="mode must be 'one_layer' or 'independent', got 'each'"):
        sample_ranks(key, {"a": 1}, "each")  # type: ignore[bad-argument-type]
