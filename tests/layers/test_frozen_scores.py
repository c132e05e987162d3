"""Attention with frozen random scores: worked numbers, kernels, ridge, and the NNX layers."""

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from lowrank_optax.layers import (
    FrozenScoreAttention,
    RandomFeatureAttention,
    RandomFeatures,
    fit_ridge,
    frozen_score_attention,
    frozen_score_features,
    infinite_head_kernel,
    score_matrices,
)

W = np.array([[[1, -1, 0.5], [0, 2, -1], [0.5, 0, 1]], [[1, 0, 0], [-1, 1, 0], [0, 0.5, -0.5]]])
kernel_jit = jax.jit(infinite_head_kernel, static_argnames=("std", "mean"))
features_jit = jax.jit(frozen_score_features, static_argnames="weights")
V = np.array([[[1.0], [0], [-1]], [[0.5], [2], [1]]])
X = np.array([1.0, 0]), np.eye(2)
OTHER = np.array([0.6, 0.8]), np.array([[0.8, 0.6], [-1, 0]])


def test_worked_features_and_outputs() -> None:
    for (query, keys), y in ((X, 0.125), (OTHER, -0.042)):
        phi = features_jit(jnp.float32(query)[None], jnp.float32(keys), jnp.float32(W))[0]
        assert_close(float(jnp.sum(phi * V[..., 0])), y, dtype=jnp.float32)
        if query is X[0]:
            np.testing.assert_allclose(phi, [[1.5, 0.25, 1.75], [0.25, 0, 0.25]], rtol=1e-6)


KERNELS = [
    ("zero", X, OTHER, 0.381380),
    ("zero", X, X, 0.652249),
    ("zero", OTHER, OTHER, 0.518495),
    ("identity", X, OTHER, 1.062824),
    ("identity", X, X, 1.539614),
]


@pytest.mark.parametrize(("mean", "x", "y", "expected"), KERNELS)
def test_worked_kernels(mean: str, x: tuple, y: tuple, expected: float) -> None:
    found = kernel_jit(*map(jnp.float32, (*x, *y)), mean=mean)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_the_kernel_is_the_closed_form_by_bivariate_normal_probabilities() -> None:
    """The other form, with SciPy's distribution: for keys of any norm and two scales."""
    rng = np.random.default_rng(0)
    q, x, p, y = (rng.normal(size=s) for s in ((3,), (2, 3), (3,), (2, 3)))
    std, total = 0.7, 0.0
    pad = lambda z: np.concatenate([z, np.ones((*z.shape[:-1], 1))], -1)
    for xi, yj in ((xi, yj) for xi in x for yj in y):
        s, t = (
            std * np.linalg.norm(pad(a)) * np.linalg.norm(pad(b)) for a, b in ((q, xi), (p, yj))
        )
        r = std**2 * (pad(q) @ pad(p)) * (pad(xi) @ pad(yj)) / (s * t)
        a, b, c = q @ xi / s, p @ yj / t, np.sqrt(1 - r * r)
        normal, both = scipy.stats.norm, scipy.stats.multivariate_normal([0, 0], [[1, r], [r, 1]])
        k = (a * b + r) * both.cdf([a, b]) + a * normal.pdf(b) * normal.cdf((a - r * b) / c)
        k += b * normal.pdf(a) * normal.cdf((b - r * a) / c) + c * c * both.pdf([a, b])
        total += s * t * k * (pad(xi) @ pad(yj)) / 4
    found = kernel_jit(*map(jnp.float32, (q, x, p, y)), std=std, mean="identity")
    np.testing.assert_allclose(found, total, rtol=1e-5)


@pytest.mark.parametrize("mean", ["zero", "identity"])
def test_many_heads_come_near_the_kernel_by_the_root_of_their_number(mean: str) -> None:
    heads = 2**15
    w = score_matrices(jax.random.key(0), range(heads), 3, mean=mean)
    phi = [features_jit(jnp.float32(q)[None], jnp.float32(x), w)[0] for q, x in (X, OTHER)]
    products = np.sum(np.asarray(phi[0] * phi[1], np.float64), axis=-1)
    expected = float(kernel_jit(*map(jnp.float32, (*X, *OTHER)), mean=mean))
    error = products.std() / np.sqrt(heads)
    assert abs(products.mean() - expected) < 4 * error
    # The spread of means of fewer heads: 32 times as large with 1/1024 of them.
    spread = products.reshape(-1, 32).mean(1).std()
    np.testing.assert_allclose(spread, error * np.sqrt(heads / 32), rtol=0.1)


def test_scores_of_unit_tokens_have_variance_one() -> None:
    w = np.asarray(score_matrices(jax.random.key(2), range(20_000), 3), np.float64)
    scores = np.einsum("d,mde,e->m", [0.6, 0.8, 1], w, [1.0, 0, 1])
    error = np.sqrt(2 / len(w))
    assert abs(scores.var() - 1) < 4 * error
    assert abs(scores.mean()) < 4 / np.sqrt(len(w))


def tokens(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(4), shape)


@pytest.mark.parametrize("weights", ["relu", "softmax"])
def test_keys_in_any_order_or_twice_give_the_same(weights: str) -> None:
    x, w = tokens(2, 5, 3), score_matrices(jax.random.key(0), range(6), 4)
    phi = features_jit(x, x, w, weights=weights)
    order = jnp.array([3, 0, 4, 1, 2])
    assert_close(features_jit(x, x[:, order], w, weights=weights), phi)
    twice = jnp.concatenate([x, x], axis=1)
    assert_close(features_jit(x, twice, w, weights=weights), phi)


@pytest.mark.parametrize("weights", ["relu", "softmax"])
def test_causal_layers_see_no_later_token_and_masks_count(weights: str) -> None:
    make = lambda causal: FrozenScoreAttention(
        3, 2, 70, weights=weights, is_causal=causal, rngs=nnx.Rngs(0)
    )
    causal, full, x = make(True), make(False), tokens(2, 5, 3)
    out = jax.jit(lambda x: causal(x))(x)
    assert_close(out[:, 1], jax.jit(lambda q, x: full(q, x))(x[:, 1:2], x[:, :2])[:, 0], 100)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(causal(x)[:, :3] ** 2)))(x)
    assert not np.any(gradient[:, 3:])
    assert np.any(gradient[:, 0])
    nothing = jax.jit(lambda x: full(x, mask=jnp.zeros((5, 5), bool)))(x)
    assert not np.any(nothing)


def test_blocks_of_heads_are_the_features_times_the_values() -> None:
    layer, x = FrozenScoreAttention(3, 2, 70, mean="identity", rngs=nnx.Rngs(0)), tokens(2, 5, 3)
    expected = np.asarray(layer.features(x), np.float64) @ np.asarray(layer.kernel[...], np.float64)
    assert_close(jax.jit(lambda x: layer(x))(x), expected, 100, dtype=jnp.float32)
    half = x.astype(jnp.bfloat16)
    assert layer(half).dtype == jnp.bfloat16
    assert_close(jax.vmap(layer)(x), expected, 100, dtype=jnp.float32)
    with jax.default_prng_impl("rbg"):  # whose draws would depend on how many are drawn at once
        assert_close(jax.jit(lambda x: layer(x))(x), expected, 100, dtype=jnp.float32)


def test_only_values_are_in_the_state_and_training_leaves_the_scores() -> None:
    layer, x = FrozenScoreAttention(3, 1, 16, seed=7, rngs=nnx.Rngs(0)), tokens(32, 4, 3)
    assert [leaf.shape for leaf in jax.tree.leaves(nnx.state(layer))] == [(64, 1)]
    before = layer.features(x)
    graphdef, params = nnx.split(layer)
    tx = optax.adamw(0.1, weight_decay=0.5)

    @jax.jit
    def step(params: nnx.State, opt_state: optax.OptState) -> tuple:
        loss = lambda params: jnp.mean((nnx.merge(graphdef, params)(x) - 1) ** 2)
        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = tx.init(params), []
    for _ in range(20):
        params, opt_state, value = step(params, opt_state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 2
    again = FrozenScoreAttention(3, 1, 16, seed=7, rngs=nnx.Rngs(9))
    np.testing.assert_array_equal(nnx.merge(graphdef, params).features(x), before)
    np.testing.assert_array_equal(again.features(x), before)


@pytest.mark.parametrize(("examples", "count"), [(12, 5), (5, 12)])
def test_ridge_solves_the_normal_equations(examples: int, count: int) -> None:
    rng = np.random.default_rng(1)
    phi, y = rng.normal(size=(examples, count)), rng.normal(size=(examples, 2))
    augmented = np.concatenate([phi, np.sqrt(0.3) * np.eye(count)])
    expected = np.linalg.lstsq(augmented, np.concatenate([y, np.zeros((count, 2))]), rcond=None)[0]
    found = jax.jit(fit_ridge)(jnp.float32(phi), jnp.float32(y), 0.3)
    assert_close(found, expected, 200, dtype=jnp.float32)


def test_the_fitted_layer_is_near_kernel_ridge_with_infinitely_many_heads() -> None:
    x = tokens(12, 4, 3)
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    query, y = x[:, :1], jnp.sum(x[:, 0] * x[:, 1], -1)[:, None, None]
    layer = FrozenScoreAttention(3, 1, 8192, rngs=nnx.Rngs(0))
    layer.fit(query, y, 0.1, x)
    pairs = jax.vmap(jax.vmap(infinite_head_kernel, (None, None, 0, 0)), (0, 0, None, None))
    kernel = np.asarray(jax.jit(pairs)(query[:, 0], x, query[:, 0], x), np.float64)
    expected = kernel @ np.linalg.solve(kernel + 0.1 * np.eye(12), np.asarray(y)[:, 0])
    np.testing.assert_allclose(layer(query, x)[:, 0], expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("gated", [False, True])
def test_the_multi_head_layer_decodes_what_it_computes(gated: bool) -> None:
    features = RandomFeatures(16, chunk_size=4)
    options = {"features": features, "gated": gated, "rngs": nnx.Rngs(0)}
    layer = RandomFeatureAttention(8, 4, 2, **options)
    x = tokens(2, 6, 8)
    whole = jax.jit(lambda x: layer(x))(x)
    decode = jax.jit(lambda x, state: layer.decode(x, state))
    first, state = decode(x[:, :4], layer.init_state(2))
    second, state = decode(x[:, 4:5], state)
    assert_close(jnp.concatenate([first, second], axis=1), whole[:, :5])
    assert not jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.Param)))
    if not gated:
        return
    linen = nnx.bridge.to_linen(RandomFeatureAttention, 8, 4, 2, features=features, gated=gated)
    variables = jax.jit(linen.init)(jax.random.key(0), x)
    assert list(variables) == ["params"]
    assert jax.jit(linen.apply)(variables, x).shape == x.shape


def test_bad_arguments_are_refused_by_name() -> None:
    make = lambda **options: FrozenScoreAttention(3, 2, **{"rngs": nnx.Rngs(0), **options})
    x, key = tokens(2, 5, 3), jax.random.key(0)
    causal = make(num_heads=2, is_causal=True)
    refused = {
        "num_heads must be a positive integer, got 0": lambda: make(num_heads=0),
        "mean='one' must be": lambda: make(mean="one"),
        "std=0 must be": lambda: make(std=0),
        "weights='gelu' must be": lambda: make(weights="gelu"),
        "seed=0.5": lambda: make(seed=0.5),
        "leave out keys": lambda: causal(x, x),
        "in_features=3": lambda: causal(x[..., :2]),
        "x has dtype int32": lambda: causal(x.astype(jnp.int32)),
        "mask must be bool.* got float32": lambda: make(num_heads=2)(x, mask=jnp.zeros((5, 5))),
        r"use jax.random.key\(seed, impl='threefry2x32'\)": lambda: score_matrices(
            jax.random.key(0, impl="rbg"), range(2), 3
        ),
        r"multiple of d \+ 1 = 4": lambda: frozen_score_attention(x, x, jnp.ones((5, 1)), key),
        "one less than": lambda: frozen_score_features(x, x[..., :2], jnp.ones((1, 4, 4))),
        "penalty=0 must be positive": lambda: fit_ridge(x[0], x[0], 0),
        "features and targets must be": lambda: fit_ridge(x[0], x[0, :2], 1.0),
        "num_heads=3 must divide in_features=8": lambda: RandomFeatureAttention(
            8, 3, rngs=nnx.Rngs(0)
        ),
        "num_key_value_heads must be a positive integer, got 0": lambda: RandomFeatureAttention(
            8, 4, 0, rngs=nnx.Rngs(0)
        ),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
