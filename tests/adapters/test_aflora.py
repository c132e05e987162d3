"""AFLoRA's layer: its start, its gradients, and what it is when its factors are frozen."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import parameter_count
from lowrank_optax.adapters.operands import Rows
from tests.adapters.compiled import compiled, gradient, layer_output

AFLoRA = compiled(lro.adapters.AFLoRA)

L, D_IN, D_OUT, R = 3, 6, 5, 2
WEIGHTS = np.random.default_rng(0).normal(size=(L, D_IN, D_OUT)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(4, D_IN)).astype(np.float32)
KEY = jax.random.key(0)


def moved(params: lro.adapters.AdapterParams, seed: int = 2) -> lro.adapters.AdapterParams:
    """The same with ``b`` away from zero, as after some training."""
    b = params.trainable["b"]
    b = np.random.default_rng(seed).normal(size=b.shape).astype(b.dtype)
    return params._replace(trainable=params.trainable | {"b": b})


def reference(p: dict[str, jax.Array], x: np.ndarray, weight: np.ndarray, c: float) -> np.ndarray:
    """The formula in float64, one output at a time."""
    a, b_factor, d, b = (np.asarray(p[n], np.float64) for n in ("A", "B", "d", "b"))
    inside = np.einsum("ni,ir,r->nr", x, a, d)
    return x @ weight + c * np.einsum("nr,ro,o->no", inside, b_factor, b)


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_forward_and_merge_are_the_formula(alpha: float | None) -> None:
    method = AFLoRA(rank=R, alpha=alpha)
    params = moved(method.init(KEY, WEIGHTS))
    for layer in range(L):
        p, weight = method.layer_arrays(params, layer), WEIGHTS[layer]
        y = layer_output(method, p, Rows(X), X @ weight, weight=weight)
        c = 1.0 if alpha is None else alpha / R
        expected = reference(p, np.asarray(X, np.float64), np.asarray(weight, np.float64), c)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        merged = method.merged(p, weight).weight
        np.testing.assert_allclose(X @ merged, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(method.unmerged(p, merged), weight, atol=1e-6)


def test_the_start_is_the_base_and_only_b_has_a_gradient() -> None:
    method = AFLoRA(rank=R)
    params = method.init(KEY, WEIGHTS)
    base = X @ WEIGHTS[0]

    def output(trainable: dict[str, jax.Array]) -> jax.Array:
        p = method.layer_arrays(params._replace(trainable=trainable), 0)
        return layer_output(method, p, Rows(X), base, weight=WEIGHTS[0])

    np.testing.assert_array_equal(output(params.trainable), base)
    slopes = gradient(lambda t: jnp.sum(jnp.sin(output(t))), params.trainable)
    assert set(slopes) == {"A", "B", "d", "b"}
    for name in ("A", "B", "d"):
        assert not np.any(slopes[name]), name
    assert np.all(slopes["b"][0] != 0)


def test_factors_start_within_hes_bounds_and_d_at_a_tenth() -> None:
    wide = jax.ShapeDtypeStruct((2, 300, 200), jnp.float32)
    params = AFLoRA(rank=50).init(KEY, wide).trainable
    for name, fan_in in (("A", 300), ("B", 50)):
        bound = np.sqrt(6 / fan_in)
        assert 0.99 * bound < np.abs(params[name]).max() <= bound
        assert np.isclose(np.std(params[name]), bound / np.sqrt(3), rtol=0.02)
    assert np.all(params["d"] == np.float32(0.1))
    assert not np.any(params["b"])


def test_factors_of_square_weights_are_frozen_from_the_start_unless_asked() -> None:
    square = jax.ShapeDtypeStruct((L, 5, 5), jnp.float32)
    params = AFLoRA(rank=R).init(KEY, square)
    assert set(params.trainable) == {"d", "b"}
    assert {"A", "B"} <= set(params.frozen)
    every = AFLoRA(rank=R, freeze_square_from_start=False).init(KEY, square)
    assert set(every.trainable) == {"A", "B", "d", "b"}
    np.testing.assert_array_equal(every.trainable["A"], params.frozen["A"])


def test_counts_are_the_papers() -> None:
    params = AFLoRA(rank=R).init(KEY, WEIGHTS[:1])
    assert parameter_count(params.trainable) == R * (D_IN + D_OUT) + R + D_OUT
    vectors = {name: params.trainable[name] for name in ("d", "b")}
    assert parameter_count(vectors) == R + D_OUT


def test_with_frozen_factors_it_is_vera_of_random_factors() -> None:
    method = AFLoRA(rank=R)
    params = moved(method.init(KEY, WEIGHTS))
    p = method.layer_arrays(params, 1)
    vera = p["A"] @ np.diag(p["d"]) @ p["B"] @ np.diag(p["b"])
    np.testing.assert_allclose(method.delta(p, WEIGHTS[1]), vera, atol=1e-6)


def test_layers_of_smaller_ranks_are_as_if_they_were_alone() -> None:
    method = AFLoRA(rank=(1, 2, 3), alpha=6.0)
    params = moved(method.init(KEY, WEIGHTS))
    for layer, rank in enumerate((1, 2, 3)):
        p = method.layer_arrays(params, layer)
        alone = {"A": p["A"][:, :rank], "B": p["B"][:rank], "d": p["d"][:rank], "b": p["b"]}
        expected = AFLoRA(rank=rank, alpha=6.0).delta(alone, WEIGHTS[layer])
        np.testing.assert_allclose(method.delta(p, WEIGHTS[layer]), expected, atol=1e-6)
        assert not np.any(p["A"][:, rank:])
        assert np.abs(p["B"]).max() <= np.sqrt(6 / rank)


def test_backward_keeps_no_input_of_the_layer_once_factors_are_frozen() -> None:
    method = AFLoRA(rank=R)
    params = moved(method.init(KEY, WEIGHTS))
    p = method.layer_arrays(params, 0)
    frozen = {name: p[name] for name in ("A", "B")}

    def branch(vectors: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return method.method.times(frozen | vectors, Rows(x))

    of_vectors = {name: p[name] for name in ("d", "b")}
    back = jax.eval_shape(lambda *args: jax.vjp(branch, *args)[1], of_vectors, X)
    shapes = [x.shape for x in jax.tree.leaves(back)]
    assert X.shape not in shapes
    assert (X.shape[0], R) in shapes


@pytest.mark.slow
def test_to_lora_gives_the_same_change() -> None:
    method = AFLoRA(rank=R, alpha=3.0)
    params = moved(method.init(KEY, WEIGHTS))
    stacked = method.stack_arrays(params, L)
    first, second = method.to_lora(stacked)
    assert first.shape == (L, D_IN, R)
    np.testing.assert_allclose(first @ second, method.deltas(params, WEIGHTS), atol=1e-6)


@pytest.mark.slow
def test_a_bfloat16_layer_keeps_float32_parameters_and_its_own_dtype() -> None:
    layer = nnx.Linear(4, 6, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 4), jnp.bfloat16)
    before = layer(x)
    lro.adapters.attach(layer, lro.adapters.AFLoRA(rank=2), where=".*", rngs=0)
    after = layer(x)
    assert after.dtype == jnp.bfloat16
    np.testing.assert_array_equal(after, before)
    trained = jax.tree.leaves(nnx.state(layer, lro.adapters.trainable))
    assert {x.dtype for x in trained} == {jnp.dtype(jnp.float32)}
