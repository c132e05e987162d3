"""The few-bit nonlinearities: each the one of ``jax.nn`` forward, and near it backward."""

import functools
import inspect
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.activations import functions

pytestmark = pytest.mark.usefixtures("coarse_grid")
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


def inputs(dtype: Any = np.float32) -> np.ndarray:
    rng = np.random.default_rng(0)
    far = [-np.inf, -200.0, -20.0, 20.0, 200.0, np.inf, np.nan]
    return np.asarray([*KINKS, *far, *3 * rng.standard_normal(500)]).astype(dtype)


def slopes(*fns: Any) -> Any:
    """Compiles the derivatives of functions of one array, in float64."""
    run = jax.jit(lambda x: [jax.vjp(fn, x)[1](jnp.ones_like(x))[0] for fn in fns])
    return lambda x: [np.asarray(slope, np.float64) for slope in run(np.asarray(x, np.float32))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_forward_is_that_of_jax_to_the_last_bit(name: str, options: dict[str, Any]) -> None:
    """Outside `jit`, where both run the same small programs: within it fusions may round anew."""
    ours, plain = pair(name, options)
    for dtype in (np.float32, jnp.bfloat16, np.float16):
        x = inputs(dtype)
        expected = plain(x)
        for found in (ours(x), jax.vjp(ours, x)[0]):
            assert found.dtype == expected.dtype == dtype
            # NumPy knows of no NaN in bfloat16.
            np.testing.assert_array_equal(np.float32(found), np.float32(expected))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_gradients_are_near_those_of_jax(name: str, options: dict[str, Any]) -> None:
    ours, plain = pair(name, options)
    bits = () if name in EXACT else (1, 3, 4)
    fns = [plain, ours, *(functools.partial(ours, bits=b) for b in bits)]
    exact, *found = slopes(*fns)(np.linspace(-9, 9, 4001))
    errors = [np.mean(np.square(slope - exact)) for slope in found]
    if name in EXACT:
        assert errors[0] < 1e-14
        return
    default, one, three, four = errors
    assert default == three
    assert one < 0.03
    assert three < one / 8
    assert four < three / 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        case if case[0] == "elu" else pytest.param(*case, marks=pytest.mark.full)
        for case in CASES
        if case[0] in SMOOTH
    ],
    ids=str,
)
def test_eight_bits_are_nearly_exact(name: str, options: dict[str, Any]) -> None:
    ours, plain = pair(name, options)
    found, exact = slopes(functools.partial(ours, bits=8), plain)(np.linspace(-9, 9, 4001))
    assert np.mean(np.square(found - exact)) < 2e-6


def test_relu_has_exactly_the_gradient_of_jax() -> None:
    found, exact = slopes(lro.activations.relu, jax.nn.relu)(inputs())
    np.testing.assert_array_equal(found, exact)
    assert jax.jit(jax.grad(lro.activations.relu))(0.0) == 0


@pytest.mark.parametrize(("name", "options"), [c for c in CASES if c[0] in EXACT], ids=str)
def test_one_bit_is_exact_at_the_kinks_too(name: str, options: dict[str, Any]) -> None:
    ours, plain = pair(name, options)
    below = np.nextafter(np.float32(KINKS), -np.float32(np.inf))
    x = np.concatenate([np.float32(KINKS), below[[0, 1, 4, 5, 6]]])
    # relu6(x + 3): one number before 3 rounds to 6.
    x = x[x != np.nextafter(np.float32(3), np.float32(0))] if name == "hard_sigmoid" else x
    assert_close(*slopes(ours, plain)(x), dtype=np.float32)
    kept = jax.eval_shape(lambda x: jax.vjp(ours, x)[1], jax.ShapeDtypeStruct((16, 8), np.float32))
    assert [(leaf.dtype, leaf.size) for leaf in jax.tree.leaves(kept)] == [(np.uint8, 16)]


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
