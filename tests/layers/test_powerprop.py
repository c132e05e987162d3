"""Powerpropagation as a map of trees: values, derivatives, inverse, which leaves, refusals."""

import functools
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

ALPHAS = (1.0, 1.3, 2.0, 4.0)
THETA = np.array([[0.0, 1e-6, -0.02, 0.3], [-0.0, -1.0, 1.7, 5.0]])


def weights_of(theta: Any, alpha: Any) -> Any:
    """Of one matrix."""
    return lro.layers.powerprop({"kernel": theta}, alpha)["kernel"]


def reference(theta: np.ndarray, alpha: float) -> np.ndarray:
    return np.sign(theta) * np.abs(theta) ** alpha


def slope(theta: np.ndarray, alpha: float) -> np.ndarray:
    """The derivative, in float64: 0⁰ is 1."""
    return alpha * np.abs(theta) ** (alpha - 1)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_values_and_gradients_are_the_formula_and_finite_at_zero(
    alpha: float, traced: bool
) -> None:
    theta = np.float32(THETA)
    direction = np.random.default_rng(0).standard_normal(THETA.shape, np.float32)

    @jax.jit
    def run(theta: jax.Array, a: jax.Array) -> Any:
        inside = lambda theta: weights_of(theta, a if traced else alpha)
        w, pullback = jax.vjp(inside, theta)
        return w, pullback(direction)[0], jax.jvp(inside, (theta,), (direction,))[1]

    w, gradient, tangent = run(theta, np.float32(alpha))
    assert_close(w, reference(THETA, alpha))
    assert_close(gradient, slope(THETA, alpha) * direction)
    assert_close(tangent, slope(THETA, alpha) * direction)


def test_the_second_derivative_is_finite_and_right_away_from_zero() -> None:
    weight = lambda t, alpha: weights_of(t[None, None], alpha)[0, 0]
    second = [jax.vmap(jax.grad(jax.grad(lambda t, a=a: weight(t, a)))) for a in ALPHAS]
    every = jax.jit(lambda theta: [of(theta) for of in second])(np.float32(THETA.ravel()))
    safe = np.where(THETA == 0, 1, np.abs(THETA))
    for alpha, found in zip(ALPHAS, every, strict=True):
        expected = alpha * (alpha - 1) * np.sign(THETA) * safe ** (alpha - 2)
        assert_close(found, expected.ravel(), 100)


def test_the_derivative_by_a_traced_alpha_is_the_logarithm_and_zero_at_zero() -> None:
    theta = np.float32(THETA)
    derivative = jax.jit(jax.jacobian(lambda a: weights_of(theta, a)))
    safe = np.where(THETA == 0, 1, np.abs(THETA))
    for alpha in ALPHAS:
        expected = reference(THETA, alpha) * np.log(safe)
        found = derivative(np.float32(alpha))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)


def test_exponent_one_returns_the_parameters_themselves() -> None:
    params = {"kernel": jnp.asarray(THETA), "bias": jnp.ones(3)}
    for alpha in (1, 1.0):
        assert lro.layers.powerprop(params, alpha)["kernel"] is params["kernel"]
        assert lro.layers.powerprop_inverse(params, alpha)["kernel"] is params["kernel"]


def test_a_traced_exponent_of_one_is_exact_too() -> None:
    theta = np.random.default_rng(0).standard_normal((40, 50), np.float32)
    one = np.float32(1)
    for function in (lro.layers.powerprop, lro.layers.powerprop_inverse):
        same = jax.jit(function)({"kernel": theta}, one)["kernel"]
        np.testing.assert_array_equal(same, theta)
    of = lambda t, one: (weights_of(t, one) * theta).sum()
    gradient = jax.jit(jax.grad(of))(theta, one)
    np.testing.assert_array_equal(gradient, theta)


def test_backward_keeps_the_parameters_alone() -> None:
    theta = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
    pullback = jax.eval_shape(lambda t: jax.vjp(lambda t: weights_of(t, 1.5), t)[1], theta)
    kept = [x for x in jax.tree.leaves(pullback) if x.size > 1]
    assert [(x.shape, x.dtype) for x in kept] == [(theta.shape, theta.dtype)]


POWER, INVERSE, CHANGE = (
    jax.jit(fn)
    for fn in (lro.layers.powerprop, lro.layers.powerprop_inverse, lro.layers.change_alpha)
)


@settings(max_examples=30, deadline=None)
@given(
    alpha=st.floats(1, 6),
    values=st.lists(st.floats(-8, 8, width=32), min_size=8, max_size=8),
)
def test_the_inverse_undoes_it_and_sizes_keep_their_order(
    alpha: float, values: list[float]
) -> None:
    theta = np.array([[*values, 1.0]], np.float32)
    theta = np.where(np.abs(theta) < 1e-3, 0, theta)  # powers below underflow
    w = np.asarray(POWER({"kernel": theta}, np.float32(alpha))["kernel"])
    back = INVERSE({"kernel": w}, np.float32(alpha))["kernel"]
    assert_close(back, theta, 800)
    order = np.argsort(np.abs(theta), kind="stable")
    sizes = np.abs(w).ravel()[order.ravel()]
    assert (sizes[1:] >= (1 - 1e-6) * sizes[:-1]).all()
    assert (np.sign(w) == np.sign(theta)).all()


@settings(max_examples=20, deadline=None)
@given(old=st.floats(1, 5), new=st.floats(1, 5))
def test_a_change_of_exponent_keeps_the_function(old: float, new: float) -> None:
    theta, old, new = {"kernel": np.float32(THETA)}, np.float32(old), np.float32(new)
    weights, switched = POWER(theta, old), CHANGE(theta, old, new)
    found = POWER(switched, new)["kernel"]
    np.testing.assert_allclose(found, weights["kernel"], rtol=1e-4, atol=1e-30)


def test_exponents_change_under_jit_on_a_schedule() -> None:
    schedule = optax.linear_schedule(1.0, 3.0, 10)
    theta = {"kernel": np.float32(THETA)}
    weights = theta["kernel"]

    @jax.jit
    def switch(theta: Any, step: jax.Array) -> Any:
        return lro.layers.change_alpha(theta, schedule(step), schedule(step + 1))

    for step in range(10):
        theta = switch(theta, np.int32(step))
    found = POWER(theta, np.float32(3))["kernel"]
    np.testing.assert_allclose(found, weights, rtol=1e-4, atol=1e-30)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_powers_of_narrow_numbers_are_rounded_once(dtype: Any) -> None:
    with jax.enable_x64(dtype == jnp.float64):
        theta = np.random.default_rng(1).standard_normal((20, 30)).astype(dtype)
        slope = jax.grad(lambda t: weights_of(t, 2.5).sum())
        w, gradient = jax.jit(lambda t: (weights_of(t, 2.5), slope(t)))(theta)
        assert w.dtype == dtype
        exact = reference(np.asarray(theta, np.float64), 2.5)
        rtol = 0.51 * float(jnp.finfo(dtype).eps) + (1e-14 if dtype == jnp.float64 else 2e-6)
        np.testing.assert_allclose(np.asarray(w, np.float64), exact, rtol=rtol, atol=1e-7)
        assert gradient.dtype == dtype


full = functools.partial(np.full, dtype=np.float32)
MODEL = {
    "embed": {"embedding": full((7, 4), 0.5)},
    "layer_0": {"kernel": full((4, 6), 0.5), "bias": full(6, 0.5)},
    "layers": {
        "norm": {"scale": full((3, 6), 0.5)},
        "up": {"kernel": full((3, 6, 6), 0.5)},
    },
    "Conv_0": {"kernel": full((3, 3, 2, 6), 0.5)},
    "lm_head": {"kernel": full((6, 7), 0.5)},
    "lora_b": full((6, 2), 0.5),
    "seed": np.ones((2, 2), np.uint32),
}


def changed(params: Any, where: Any) -> list[str]:
    weights = jax.jit(lambda params: lro.layers.powerprop(params, 2.0, where))(params)
    same = jax.tree.map(np.array_equal, params, weights)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, unchanged in jax.tree_util.tree_leaves_with_path(same)
        if not unchanged
    ]


def test_layers_stacked_layers_convolutions_and_heads_are_reparameterised_by_default() -> None:
    kernels = ["Conv_0/kernel", "layer_0/kernel", "layers/up/kernel", "lm_head/kernel"]
    assert changed(MODEL, None) == kernels


def test_leaves_are_chosen_by_a_pattern_or_a_function() -> None:
    assert changed(MODEL, "layer_0") == ["layer_0/bias", "layer_0/kernel"]
    assert changed(MODEL, lambda path, shape: shape == (6, 7)) == ["lm_head/kernel"]


def test_stacked_leaves_are_the_layers_one_by_one() -> None:
    theta = np.random.default_rng(2).standard_normal((3, 5, 5), np.float32)
    stacked = lambda t: lro.layers.powerprop({"kernel": t}, 1.7, "kernel")["kernel"]
    assert_close(*jax.jit(lambda t: (stacked(t)[1], weights_of(t[1], 1.7)))(theta))
    x = np.ones((2, 5), np.float32)

    def output(t: jax.Array, inside: bool) -> jax.Array:
        layer = lambda x, t: (jnp.tanh(x @ (weights_of(t, 1.7) if inside else t)), None)
        return jax.lax.scan(layer, x, t if inside else stacked(t))[0].sum()

    gradient = jax.jit(jax.grad(output), static_argnums=1)
    assert_close(gradient(theta, True), gradient(theta, False), 100)


def test_empty_leaves_and_trees_pass() -> None:
    for params in ({}, {"kernel": jnp.zeros((0, 3))}, {"none": None}):
        weights = lro.layers.powerprop(lro.layers.powerprop_inverse(params, 2.0), 2.0)
        assert jax.tree.structure(weights) == jax.tree.structure(params)


@pytest.mark.parametrize("alpha", [0.99, 0, -1.0, float("nan"), float("inf"), jnp.float32(0.5)])
def test_exponents_below_one_are_refused(alpha: Any) -> None:
    params = {"kernel": jnp.ones((2, 2))}
    for function in (lro.layers.powerprop, lro.layers.powerprop_inverse):
        with pytest.raises(ValueError, match=r"alpha=.* at least 1"):
            function(params, alpha)
    with pytest.raises(ValueError, match="new="):
        lro.layers.change_alpha(params, 1.0, alpha)
    with pytest.raises(ValueError, match="alpha="):
        lro.layers.powerprop_updates(optax.sgd(0.1), alpha)


def test_other_bad_arguments_are_refused() -> None:
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(TypeError, match=r"alpha='much'.*number"):
        lro.layers.powerprop(params, "much")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"where='krenel' matches no leaf; near.*kernel"):
        lro.layers.powerprop(params, 2.0, "krenel")
    with pytest.raises(ValueError, match="no regular expression"):
        lro.layers.powerprop(params, 2.0, "(")
    with pytest.raises(TypeError, match="where="):
        lro.layers.powerprop(params, 2.0, 3)  # type: ignore[arg-type]


def test_weights_that_are_all_zero_are_refused_unless_left_out() -> None:
    params = {"head": {"kernel": jnp.zeros((2, 2))}, "up": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match="head/kernel: all weights are zero"):
        lro.layers.powerprop_inverse(params, 2.0)
    with pytest.raises(ValueError, match="head/kernel: all weights are zero"):
        lro.layers.powerprop_updates(optax.sgd(0.1), 2.0).init(params)
    lro.layers.powerprop_inverse(params, 2.0, "up")
    lro.layers.powerprop_inverse(params, 1.0)
    jax.jit(lambda p: lro.layers.powerprop_inverse(p, 2.0))(params)
