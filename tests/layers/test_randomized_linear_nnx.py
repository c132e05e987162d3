"""The randomized layer in NNX is nnx.Linear but for its kernel's gradient, which is unbiased."""

from collections.abc import Callable
import functools
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")

from flax import nnx

import lowrank_optax as lro
from lowrank_optax.layers import RandomizedLinear, Sketch

X = np.random.default_rng(0).standard_normal((2, 8, 3), np.float32)
T = np.random.default_rng(1).standard_normal((2, 8, 4), np.float32)
QUARTER = Sketch("rows", fraction=0.25)


def pair(sketch: Sketch = QUARTER, **options: Any) -> tuple[RandomizedLinear, nnx.Linear]:
    """A randomized layer and the plain one with the same weights."""
    layer = RandomizedLinear(3, 4, sketch=sketch, rngs=nnx.Rngs(0), **options)
    return layer, nnx.Linear(3, 4, rngs=nnx.Rngs(0), **options)


def loss(layer: Any, x: jax.Array = X, **call: Any) -> jax.Array:
    return jnp.sum((layer(x, **call) - T) ** 2)


@functools.partial(nnx.jit, static_argnames="deterministic")
def jitted(layer: Any, **call: Any) -> jax.Array:
    return nnx.grad(lambda layer: loss(layer, **call))(layer).kernel[...]


def kernel_gradient(layer: Any, **call: Any) -> np.ndarray:
    return np.asarray(jitted(layer, **call))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": False},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
        {"precision": "highest", "preferred_element_type": jnp.float32, "dtype": jnp.bfloat16},
    ],
    ids=str,
)
def test_outputs_and_other_gradients_are_those_of_the_plain_layer(options: dict[str, Any]) -> None:
    layer, plain = pair(**options)
    both = nnx.jit(lambda layer, x: (layer(x), nnx.grad(loss, argnums=(0, 1))(layer, x)))
    outputs, (of_layer, of_x) = both(layer, X)
    expected, (of_plain, plain_of_x) = both(plain, X)
    assert outputs.dtype == expected.dtype
    assert_close(outputs, expected)
    assert_close(of_x, plain_of_x, dtype=outputs.dtype)
    if plain.bias is not None:
        assert_close(of_layer.bias[...], of_plain.bias[...])
    assert of_layer.kernel.dtype == plain.kernel.dtype
    assert not np.allclose(*(np.float32(of.kernel[...]) for of in (of_layer, of_plain)))


@pytest.mark.parametrize(
    "plainly",
    [
        lambda layer: kernel_gradient(nnx.view(layer, deterministic=True)),
        lambda layer: kernel_gradient(layer, deterministic=True),
        lambda layer: (layer.eval(), kernel_gradient(layer), layer.train())[1],
    ],
    ids=["view", "call", "eval"],
)
def test_deterministic_is_the_plain_layer(plainly: Callable[[Any], np.ndarray]) -> None:
    layer, plain = pair()
    assert_close(plainly(layer), kernel_gradient(plain))
    assert int(layer.sketch_stream.count[...]) == 0
    assert np.any(kernel_gradient(layer) != kernel_gradient(plain))


def test_deterministic_from_the_start_and_overridden_by_the_call() -> None:
    layer, plain = pair()
    fixed = RandomizedLinear(3, 4, sketch=QUARTER, rngs=nnx.Rngs(0), deterministic=True)
    assert_close(kernel_gradient(fixed), kernel_gradient(plain))
    assert_close(kernel_gradient(fixed, deterministic=False), kernel_gradient(layer))


def test_with_all_rows_kept_the_gradient_is_the_plain_one() -> None:
    layer, plain = pair(Sketch("rows", fraction=1.0))
    assert_close(kernel_gradient(layer), kernel_gradient(plain))


def test_gradient_is_the_functional_one_with_the_key_of_the_layer_and_the_call() -> None:
    layer, _ = pair()
    key, kernel, bias = layer.sketch_stream.key[...], layer.kernel[...], layer.bias[...]

    def functional(kernel: jax.Array, call: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, call)
        return loss(
            lambda x: lro.layers.randomized_linear(x, kernel, bias, key=own, sketch=QUARTER)
        )

    expected = jax.jit(jax.vmap(jax.grad(functional), (None, 0)))(kernel, np.arange(3))
    for call in range(3):
        assert_close(kernel_gradient(layer), expected[call])


def test_gradient_has_the_plain_one_as_its_mean_over_calls() -> None:
    layer, plain = pair(Sketch("stratified", size=3))
    graphdef, state = nnx.split(layer)

    def call(state: Any, _: Any) -> Any:
        layer = nnx.merge(graphdef, state)
        gradient = nnx.grad(loss)(layer).kernel[...]
        return nnx.state(layer), gradient

    _, drawn = jax.jit(lambda state: jax.lax.scan(call, state, length=2000))(state)
    drawn = np.asarray(drawn, np.float64)
    error = drawn.mean(0) - kernel_gradient(plain)
    assert np.all(np.abs(error) < 4 * drawn.std(0) / np.sqrt(len(drawn)))


def test_each_call_and_each_layer_has_a_key_of_its_own() -> None:
    rngs = nnx.Rngs(0)
    one = RandomizedLinear(3, 4, sketch=QUARTER, rngs=rngs)
    other = RandomizedLinear(3, 4, sketch=QUARTER, rngs=rngs)
    nnx.update(other, nnx.state(one, nnx.Param))
    drawn = [kernel_gradient(layer) for layer in (one, one, other)]
    assert np.any(drawn[0] != drawn[1])
    assert np.any(drawn[0] != drawn[2])
    again = RandomizedLinear(3, 4, sketch=QUARTER, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(drawn[0], kernel_gradient(again))


def test_each_micro_batch_has_a_key_of_its_own() -> None:
    layer, _ = pair()
    both = lambda layer: (loss(layer), loss(layer))
    first, second = (
        nnx.jit(nnx.grad(lambda m, i=i: both(m)[i]))(layer).kernel[...] for i in (0, 1)
    )
    assert int(layer.sketch_stream.count[...]) == 4
    assert not np.allclose(first, second)


def test_the_stream_named_sketch_is_its_own_and_can_be_reseeded() -> None:
    layers = [
        RandomizedLinear(3, 4, sketch=QUARTER, rngs=nnx.Rngs(params=0, sketch=seed))
        for seed in (1, 1, 2)
    ]
    one, same, other = (kernel_gradient(layer) for layer in layers)
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)
    for layer in layers:
        nnx.reseed(layer, sketch=7)
    np.testing.assert_array_equal(kernel_gradient(layers[0]), kernel_gradient(layers[2]))


def test_layers_stacked_by_vmap_have_a_key_each() -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> RandomizedLinear:
        return RandomizedLinear(3, 4, sketch=QUARTER, rngs=rngs)

    keys = jax.random.key_data(make(nnx.Rngs(0)).sketch_stream.key[...])
    assert len(np.unique(keys, axis=0)) == 3


def test_what_is_kept_is_the_sketch_and_its_key() -> None:
    layer = RandomizedLinear(64, 4, sketch=QUARTER, use_bias=False, rngs=nnx.Rngs(0))
    graphdef, kernel, rest = nnx.split(layer, nnx.Param, ...)
    x = np.ones((80, 64), np.float32)
    call = lambda kernel: nnx.merge(graphdef, kernel, rest, copy=True)(x)
    backward = jax.eval_shape(lambda kernel: jax.vjp(call, kernel)[1], kernel)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))
    assert kept == 20 * 64 * 4 + layer.sketch_stream.key.nbytes


def test_nothing_of_rows_that_are_not_valid_comes_into_the_gradient() -> None:
    layer, plain = pair()
    # Four of them, as many as the sketch has rows.
    valid = jnp.asarray(np.arange(16).reshape(2, 8) % 4 == 1)

    def gradient(layer: Any, **call: Any) -> jax.Array:
        masked = lambda m: jnp.sum(jnp.where(valid[..., None], (m(X, **call) - T) ** 2, 0))
        return nnx.jit(nnx.grad(masked))(layer).kernel[...]

    assert_close(gradient(layer, valid=valid), gradient(plain))


def test_trains_with_an_optimizer_under_jit() -> None:
    layer, _ = pair(Sketch("stratified", fraction=0.5))
    optimizer = nnx.Optimizer(layer, optax.adam(3e-2), wrt=nnx.Param)

    @nnx.jit
    def step(layer: Any, optimizer: nnx.Optimizer) -> jax.Array:
        value, gradient = nnx.value_and_grad(loss)(layer)
        optimizer.update(layer, gradient)
        return value

    losses = [float(step(layer, optimizer)) for _ in range(100)]
    assert losses[-1] < 0.8 * losses[0]
    assert int(layer.sketch_stream.count[...]) == 100


def test_bad_arguments_are_refused_where_they_are_given() -> None:
    with pytest.raises(TypeError, match=r"sketch=0\.1 must be a lro\.layers\.Sketch"):
        RandomizedLinear(3, 4, sketch=0.1, rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    own = lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)
    with pytest.raises(ValueError, match="dot_general="):
        RandomizedLinear(3, 4, sketch=QUARTER, rngs=nnx.Rngs(0), dot_general=own)
    layer, _ = pair()
    with pytest.raises(ValueError, match=r"out_sharding=.*reshard"):
        layer(X, out_sharding=jax.sharding.PartitionSpec("x"))


def test_a_flax_layer_that_multiplies_by_other_means_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nnx.Linear, "__call__", lambda layer, x, _=None: x @ layer.kernel[...])
    with pytest.raises(RuntimeError, match="called its attribute dot_general 0 times"):
        pair()[0](X)
