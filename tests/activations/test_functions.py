"""The few-bit nonlinearities: each the one of ``jax.nn`` forward, and near it backward."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.activations import functions

SMOOTH = ["celu", "elu", "gelu", "hard_silu", "hard_swish", "log_sigmoid", "mish", "selu"]
SMOOTH += ["sigmoid", "silu", "soft_sign", "softplus", "squareplus", "swish", "tanh"]
EXACT = ["hard_sigmoid", "hard_tanh", "leaky_relu", "relu", "relu6"]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "gelu": [{"approximate": False}],
    "elu": [{"alpha": 0.5}],
    "celu": [{"alpha": 2.0}],
    "squareplus": [{"b": 1.0}],
    "leaky_relu": [{"negative_slope": 0.2}],
}
CASES = [(name, {}) for name in SMOOTH + EXACT]
CASES += [(name, options) for name, choices in OPTIONS.items() for options in choices]
KINKS = [-3.0, -1.0, 0.0, -0.0, 1.0, 3.0, 6.0]


def pair(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The few-bit function and the plain one."""
    return (
        functools.partial(getattr(lro.activations, name), **options),
        functools.partial(getattr(jax.nn, name), **options),
    )


def inputs(dtype: Any = jnp.float32) -> jax.Array:
    rng = np.random.default_rng(0)
    far = [-jnp.inf, -200.0, -20.0, 20.0, 200.0, jnp.inf, jnp.nan]
    return jnp.asarray([*KINKS, *far, *3 * rng.standard_normal(500)], dtype)


def slopes(fn: Any, x: jax.Array) -> np.ndarray:
    return np.asarray(jax.vjp(fn, x)[1](jnp.ones_like(x))[0], np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_forward_is_that_of_jax_to_the_last_bit(
    name: str, options: dict[str, Any], dtype: Any
) -> None:
    ours, plain = pair(name, options)
    x = inputs(dtype)
    for run in (lambda f: f, jax.jit):
        found, expected = run(ours)(x), run(plain)(x)
        assert found.dtype == expected.dtype == dtype
        found_too = run(lambda x: jax.vjp(ours, x)[0])(x)
        # NumPy knows of no NaN in bfloat16.
        found, found_too, expected = (np.float32(y) for y in (found, found_too, expected))
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found_too, expected)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_gradients_are_near_those_of_jax(name: str, options: dict[str, Any]) -> None:
    ours, plain = pair(name, options)
    x = jnp.linspace(-9, 9, 4001)
    exact = slopes(plain, x)
    mean_square = lambda fn: np.mean(np.square(slopes(fn, x) - exact))
    if name in EXACT:
        assert mean_square(ours) < 1e-14
        return
    errors = [mean_square(functools.partial(ours, bits=bits)) for bits in (1, 3, 8)]
    assert errors[1] == mean_square(ours)  # 3 bits by default
    assert errors[0] < 0.03
    assert errors[1] < errors[0] / 8
    assert errors[2] < 2e-6


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_relu_has_exactly_the_gradient_of_jax(jit: bool) -> None:
    x = inputs()
    gradient = lambda fn: (jax.jit if jit else lambda f: f)(jax.grad(lambda x: fn(x).sum()))(x)
    np.testing.assert_array_equal(gradient(lro.activations.relu), gradient(jax.nn.relu))
    assert jax.grad(lro.activations.relu)(0.0) == 0


@pytest.mark.parametrize(("name", "options"), [c for c in CASES if c[0] in EXACT], ids=str)
def test_one_bit_is_exact_at_the_kinks_too(name: str, options: dict[str, Any]) -> None:
    ours, plain = pair(name, options)
    below = np.nextafter(np.float32(KINKS), -np.float32(np.inf))
    x = jnp.asarray(np.concatenate([KINKS, below[[0, 1, 4, 5, 6]]]), jnp.float32)
    # relu6(x + 3): one number before 3 rounds to 6.
    x = x[x != np.nextafter(np.float32(3), np.float32(0))] if name == "hard_sigmoid" else x
    np.testing.assert_allclose(slopes(ours, x), slopes(plain, x), rtol=1e-6, atol=1e-12)
    (kept,) = jax.tree.leaves(jax.vjp(ours, jnp.ones((16, 8)))[1])
    assert (kept.dtype, kept.size) == (jnp.uint8, 16)


def test_their_signatures_and_names_are_of_their_own() -> None:
    for name in SMOOTH + EXACT:
        fn = getattr(lro.activations, name)
        arguments = list(inspect.signature(fn).parameters)
        assert arguments[:2] == (["x", "bits"] if name in SMOOTH else arguments[:2]), name
        assert ("bits" in arguments) is (name in SMOOTH)
        assert fn.__module__ == functions.__name__
        assert fn.__doc__.count("Example:") == 1
    assert lro.activations.swish is lro.activations.silu
    assert lro.activations.hard_swish is lro.activations.hard_silu


@pytest.mark.parametrize("name", SMOOTH)
def test_other_numbers_of_bits_are_refused(name: str) -> None:
    for bits in (0, 9, 16, 2.0, None):
        with pytest.raises(ValueError, match=f"bits={bits!r} must be .*1 to 8"):
            getattr(lro.activations, name)(1.0, bits)


def test_options_are_python_numbers() -> None:
    for name, argument in (("elu", "alpha"), ("celu", "alpha"), ("squareplus", "b")):
        fn = getattr(lro.activations, name)
        with pytest.raises(TypeError, match=f"{argument}=.* must be a Python number"):
            jax.jit(lambda a, fn=fn, argument=argument: fn(1.0, **{argument: a}))(2.0)
    with pytest.raises(TypeError, match="negative_slope='a' must be a Python number"):
        lro.activations.leaky_relu(1.0, "a")
    with pytest.raises(TypeError, match=r"few_bit\(leaky_relu, bits=1\) needs floating point"):
        lro.activations.leaky_relu(1)


def test_a_step_compiles_once_for_equal_options() -> None:
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def apply(fn: Any, x: jax.Array) -> jax.Array:
        traced.append(fn)
        return fn(x)

    for _ in range(3):
        apply(lro.activations.few_bit(functions._partial(jax.nn.elu, alpha=0.5)), jnp.ones(3))
        jax.jit(lro.activations.elu)(jnp.ones(3))
    assert len(traced) == 1
