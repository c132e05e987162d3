"""Random features of the softmax kernel: unbiased, causal, in chunks, and with a small state."""

import functools
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.layers import (
    FeatureKind,
    RandomFeatures,
    causal_linear_attention,
    decode_random_features,
    init_random_feature_state,
    random_feature_attention,
    random_projection,
    scaled_features,
)
from lowrank_optax.layers.random_features.linear_attention import empty_state

Q, K = np.array([0.5, -0.3, 0.2, 0.1]), np.array([0.4, 0.1, -0.2, 0.6])
KINDS: tuple[FeatureKind, ...] = ("positive", "positive_pm", "trig")
# Variances of one estimate of exp(q · k) with 4 features, derived: independent, orthogonal.
VARIANCES = {
    "positive": (1.030561, 0.913035),
    "positive_pm": (0.380357, 0.262830),
    "trig": (0.0632323, 0.0276941),
}
FEATURES = RandomFeatures(num_features=24, chunk_size=8)


@functools.partial(jax.jit, static_argnames=("count", "orthogonal"))
def projections(key: jax.Array, count: int, orthogonal: bool) -> jax.Array:
    """Many draws of 4 directions of width 4, by NumPy's QR where they are orthogonal."""
    draw = lambda key: random_projection(key, 4, 4, orthogonal=orthogonal)
    return jax.vmap(draw)(jax.random.split(key, count))


def estimates(w: jax.Array, q: Any, k: Any, kind: FeatureKind) -> np.ndarray:
    def one(w: jax.Array) -> jax.Array:
        (u, a), (v, b) = (scaled_features(jnp.asarray(x, jnp.float32), w, kind) for x in (q, k))
        return u @ v * jnp.exp(a + b)

    return np.asarray(jax.jit(jax.vmap(one))(w), np.float64)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_estimates_are_unbiased_and_have_the_derived_variance(orthogonal: bool) -> None:
    count = 20_000
    w = projections(jax.random.key(3), count, orthogonal)
    far = np.array([1.2, 0, 0, 0])  # only uniform orthogonal rows are unbiased here
    for kind in KINDS:
        found = estimates(w, Q, K, kind)
        error = found.std() / np.sqrt(count)
        assert abs(found.mean() - np.exp(Q @ K)) < 4 * error
        squares = (found - found.mean()) ** 2
        error = squares.std() / np.sqrt(count)
        assert abs(squares.mean() - VARIANCES[kind][orthogonal]) < 4 * error
        found = estimates(w, far, far, kind)
        error = max(found.std() / np.sqrt(count), 1e-6)
        assert abs(found.mean() - np.exp(far @ far)) < 4 * error


def test_directions_do_not_depend_on_the_default_kind_of_keys() -> None:
    with jax.default_prng_impl("rbg"):
        found = RandomFeatures(4, seed=77).projection(3)
    expected = random_projection(jax.random.key(77, impl="threefry2x32"), 4, 3)
    assert_close(found, expected)


def test_orthogonal_directions_are_so_in_blocks_and_have_the_norms_of_normal_ones() -> None:
    w = np.asarray(random_projection(jax.random.key(0), 10, 4), np.float64)
    assert w.shape == (10, 4)
    for rows in (w[:4], w[4:8], w[8:]):
        gram = rows @ rows.T
        assert_close(gram, np.diag(np.diag(gram)), 32, dtype=jnp.float32)
    assert np.ptp(np.linalg.norm(w, axis=1)) > 0.1


def numpy_weights(q: Any, k: Any, kind: str, features: RandomFeatures) -> np.ndarray:
    """φ(q_t) · φ(k_s) in float64, without scales: [T, S]."""
    w = features.projection(q.shape[-1]).astype(np.float64)

    def phi(x: np.ndarray) -> np.ndarray:
        square = np.sum(x * x, axis=-1, keepdims=True) / 2
        if kind == "trig":
            return np.exp(square) * np.concatenate([np.cos(x @ w.T), np.sin(x @ w.T)], axis=-1)
        signs = np.concatenate([w, -w]) if kind == "positive_pm" else w
        return np.exp(x @ signs.T - square)

    return phi(q) @ phi(k).T


def reference(q: Any, k: Any, v: Any, features: RandomFeatures, *, causal: bool, gate=None) -> Any:
    """Attention ``[B, T, N, H]`` by the quadratic form, head after head, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    root, group, out = q.shape[3] ** -0.25, q.shape[2] // k.shape[2], np.zeros(q.shape)
    for b, head in np.ndindex(q.shape[0], q.shape[2]):
        one = q[b, :, head] * root, k[b, :, head // group] * root
        weights = numpy_weights(*one, features.kind, features)
        if causal:
            weights = np.tril(weights)
        if gate is not None:
            g = np.asarray(gate, np.float64)[b, :, head // group]
            for t, s in np.ndindex(weights.shape):
                weights[t, s] *= (1 - g[s]) * np.prod(g[s + 1 : t + 1])
        out[b, :, head] = weights @ v[b, :, head // group] / weights.sum(1, keepdims=True)
    return out


def inputs(length: int = 19, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(1), 3)
    draw = lambda key, heads: jax.random.normal(key, (2, length, heads, 4), dtype)
    return draw(keys[0], 4), draw(keys[1], 2), draw(keys[2], 2)


GATE = jax.nn.sigmoid(jax.random.normal(jax.random.key(5), (2, 19, 2)) + 1)


@functools.partial(jax.jit, static_argnames=("features", "is_causal"))
def attend(q: Any, k: Any, v: Any, features: RandomFeatures, is_causal=True, gate=None) -> Any:
    return random_feature_attention(q, k, v, features=features, is_causal=is_causal, gate=gate)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["full", "causal", "gated"])
def test_attention_is_the_quadratic_form(kind: FeatureKind, form: str) -> None:
    features = RandomFeatures(num_features=24, kind=kind, chunk_size=8)
    gate = GATE if form == "gated" else None
    q, k, v = inputs()
    q, k = (q / 2, k / 2) if kind == "trig" else (q, k)  # else denominators come near 0
    out = attend(q, k, v, features, form != "full", gate)
    expected = reference(q, k, v, features, causal=form != "full", gate=gate)
    assert_close(out, expected, 400 if kind == "trig" else 64, dtype=jnp.float32)


def test_chunks_of_any_size_and_steps_of_the_state_give_the_same() -> None:
    q, k, v = inputs()
    whole = attend(q, k, v, RandomFeatures(num_features=24, chunk_size=19), gate=GATE)
    for size in (1, 5):
        features = RandomFeatures(num_features=24, chunk_size=size)
        assert_close(attend(q, k, v, features, gate=GATE), whole)

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        *qkv, gate = (y[:, None] for y in x)
        out, state = decode_random_features(*qkv, state, features=FEATURES, gate=gate)
        return state, out[:, 0]

    @jax.jit
    def decode(state: Any, *operands: Any) -> Any:
        prompt, rest = ([x[:, part] for x in operands] for part in (np.s_[:7], np.s_[7:]))
        first, state = decode_random_features(*prompt[:3], state, features=FEATURES, gate=prompt[3])
        state, out = jax.lax.scan(step, state, [jnp.moveaxis(x, 1, 0) for x in rest])
        return jnp.concatenate([first, jnp.moveaxis(out, 0, 1)], axis=1), state

    empty = init_random_feature_state(FEATURES, 2, 2, 4)
    out, state = decode(empty, q, k, v, GATE)
    assert_close(out, whole)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)


@pytest.mark.parametrize("norm", [1.0, 28.0])
def test_the_future_is_not_seen(norm: float) -> None:
    q, k, v = inputs()
    q, k = (norm * x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    earlier = lambda k, v: attend(q, k, v, FEATURES)[:, :13]
    before = earlier(k, v)
    assert np.isfinite(before).all()
    for factor in (0.0, 4.0, 10.0):  # one in the same chunk, and one in another
        changed = k.at[:, 13].multiply(factor).at[:, 18].multiply(factor)
        assert_close(earlier(changed, v), before, 4)
    gradients = jax.grad(lambda k, v: jnp.sum(jnp.square(earlier(k, v))), argnums=(0, 1))(k, v)
    for gradient in gradients:
        assert not np.any(gradient[:, 13:])
        assert np.isfinite(gradient).all()
        assert np.any(gradient[:, :13])


def test_large_keys_keep_precision_and_outputs_stay_between_values() -> None:
    q, k, v = inputs()
    q, k = (28 * x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    out = np.asarray(attend(q, k, v, FEATURES))
    expected = reference(q, k, v, FEATURES, causal=True)
    np.testing.assert_allclose(out, expected, atol=2e-4)  # of exponents near 200
    for t in range(19):
        seen = np.repeat(np.asarray(v)[:, : t + 1], 2, axis=2)
        assert (out[:, t] <= seen.max(1) + 1e-5).all()
        assert (out[:, t] >= seen.min(1) - 1e-5).all()


def test_gradients_are_those_of_the_quadratic_form() -> None:
    q, k, v = inputs(length=7)
    w = jnp.asarray(FEATURES.projection(4))
    cotangent = jax.random.normal(jax.random.key(8), q.shape)

    def quadratic(q: Any, k: Any, v: Any, gate: Any) -> jax.Array:
        k, v, g = (jnp.repeat(x, 2, axis=2) for x in (k, v, gate))
        phi = lambda x: jnp.exp(x @ w.T - jnp.sum(x * x, -1, keepdims=True) / 2)
        scores = jnp.einsum("btnf,bsnf->bnts", phi(q * 4**-0.25), phi(k * 4**-0.25))
        kept = jnp.cumsum(jnp.log(g), axis=1)
        decay = jnp.exp(kept[:, :, None] - kept[:, None]) * (1 - g)[:, None]
        scores = jnp.tril(scores * jnp.moveaxis(decay, 3, 1))
        return jnp.einsum("bnts,bsnh->btnh", scores / scores.sum(-1, keepdims=True), v)

    gate = GATE[:, :7]
    arguments = q, k, v, gate
    chunked = lambda q, k, v, g: attend(q, k, v, RandomFeatures(24, chunk_size=3), gate=g)
    found, expected = (
        jax.jit(jax.grad(lambda *x, f=f: jnp.sum(f(*x) * cotangent), argnums=(0, 1, 2, 3)))(
            *arguments
        )
        for f in (chunked, quadratic)
    )
    assert_close(found, expected, 200)


def test_attention_tends_to_softmax_as_features_grow() -> None:
    q, k, v = (x / 2 for x in inputs())
    exact = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    errors = [
        float(jnp.sqrt(jnp.mean(jnp.square(attend(q, k, v, RandomFeatures(m)) - exact))))
        for m in (64, 1024)
    ]
    assert errors[1] < 0.03
    assert 2 < errors[0] / errors[1] < 8  # 4, by the root of the number


def test_a_constant_gate_weighs_by_age_and_extreme_gates_are_exact() -> None:
    q, k, v = inputs()
    gate = jnp.full((2, 19, 2), 0.7)
    # Gates of 1 keep all earlier keys and add none; of 0 they leave only the new one.
    out = attend(q, k, v, FEATURES, gate=jnp.zeros_like(gate))
    assert_close(out, jnp.repeat(v, 2, axis=2), 8)
    ones = gate.at[:, 1:].set(1.0)
    out = attend(q, k, v, FEATURES, gate=ones)
    assert_close(out, jnp.broadcast_to(jnp.repeat(v, 2, axis=2)[:, :1], out.shape), 8)
    gradient = jax.grad(lambda g: jnp.sum(attend(q, k, v, FEATURES, gate=g)))
    for g in (jnp.zeros_like(gate), ones):
        assert np.isfinite(gradient(g)).all()
    aged = reference(q, k, v, FEATURES, causal=True, gate=gate)
    assert_close(attend(q, k, v, FEATURES, gate=gate), aged, 64, dtype=jnp.float32)


def test_masked_keys_count_for_nothing() -> None:
    q, k, v = inputs()
    mask = jnp.arange(19) < jnp.array([11, 0])[:, None]
    for causal in (False, True):
        run = functools.partial(random_feature_attention, features=FEATURES, is_causal=causal)
        out = jax.jit(run)(q, k, v, mask[:, None, None])
        short = jax.jit(run)(q[:1, :11], k[:1, :11], v[:1, :11])
        assert_close(out[:1, :11], short)
        assert not np.any(out[1])


def test_half_precision_is_computed_in_float32_and_batches_by_vmap() -> None:
    q, k, v = inputs(dtype=jnp.bfloat16)
    out = attend(q, k, v, FEATURES)
    assert out.dtype == jnp.bfloat16
    assert_close(
        out, attend(*(x.astype(jnp.float32) for x in (q, k, v)), FEATURES), 2, dtype=out.dtype
    )
    one = lambda q, k, v: attend(q[None], k[None], v[None], FEATURES)[0]
    assert_close(jax.vmap(one)(q, k, v), out, 2)


def test_any_feature_map_and_a_single_position() -> None:
    linear = lambda x: (jax.nn.elu(x) + 1, jnp.zeros(x.shape[:-1]))
    q, k, v = (x[0, :, :2] for x in inputs())
    out, state = causal_linear_attention(
        jnp.moveaxis(q, 1, 0), k[:, 0], v[:, 0], linear, empty_state(4, 5), chunk_size=4
    )
    phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))).astype(np.float64)
    weights = np.tril(phi(np.asarray(q[:, 1])) @ phi(np.asarray(k[:, 0])).T)
    expected = weights @ np.asarray(v[:, 0]) / weights.sum(1, keepdims=True)
    assert_close(out[1], expected, dtype=jnp.float32)
    total = np.asarray(state.sums) * np.exp(float(state.log_scale))
    assert_close(total[:, -1], phi(np.asarray(k[:, 0])).sum(0), dtype=jnp.float32)


def test_bad_arguments_are_refused_by_name() -> None:
    q, k, v = inputs()
    full = jnp.ones((2, 1, 19, 19), bool)
    attention = functools.partial(random_feature_attention, q, k, v)
    state = init_random_feature_state(RandomFeatures(8), 2, 2, 4)
    refused = {
        "num_features must be a positive integer, got 0": lambda: RandomFeatures(num_features=0),
        "num_features must be a positive integer, got 1.5": lambda: RandomFeatures(
            num_features=1.5
        ),  # pyrefly: ignore
        "chunk_size must be a positive integer, got 0": lambda: RandomFeatures(chunk_size=0),
        "kind='relu'": lambda: RandomFeatures(kind="relu"),  # pyrefly: ignore
        "seed=None": lambda: RandomFeatures(seed=None),  # pyrefly: ignore
        "width must be a positive integer, got 0": lambda: random_projection(
            jax.random.key(0), 3, 0
        ),
        "gate is for causal": lambda: attention(gate=GATE),
        r"gate must be in \[0, 1\], got numbers from": lambda: attention(
            gate=GATE + 1, is_causal=True
        ),
        "gate must have shape": lambda: attention(gate=GATE[:1], is_causal=True),
        r"mask must have shape \[B, 1, 1, S\]": lambda: attention(full),
        "scale=-1.0 must be positive": lambda: attention(scale=-1.0),
        "multiple of the key's 2": lambda: random_feature_attention(q[:, :, :3], k, v),
        "same number of queries and keys, got 18": lambda: random_feature_attention(
            q[:, 1:], k, v, is_causal=True
        ),
        "it is of other features": lambda: decode_random_features(q, k, v, state),
        "projection's width 5": lambda: scaled_features(q, jnp.ones((3, 5))),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
