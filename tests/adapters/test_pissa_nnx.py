"""PiSSA and SVFit in the scanned and the unrolled decoder."""

import dataclasses
import functools
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.models import Decoder, decoder_config
from tests.adapters.nnx_models import Scanned

PiSSA, SVFit = lro.adapters.PiSSA, lro.adapters.SVFit
CONFIG = dataclasses.replace(
    decoder_config("llama-tiny", vocab_size=23),
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
TOKENS = np.arange(12).reshape(2, 6) % 11
WHERE = "query|value|down"
METHODS = [
    PiSSA(rank=3, alpha=6),
    PiSSA(rank=3, alpha=6, residual=False),
    PiSSA(rank=(1, 3)),
    SVFit(rank=3),
    SVFit(energy=0.5),
]
NAMES = ["pissa", "pissa-free", "pissa-ranks", "svfit", "svfit-energy"]
# The standard tier asks for one of each class, in a stack of small blocks.
IN_BLOCKS = ("pissa", "svfit-energy")
logits_of = nnx.jit(lambda model: model(TOKENS))


def blocks() -> Any:
    return Scanned(2, nnx.Rngs(0), remat=True)


def decoder() -> Any:
    return nnx.clone(_decoder())


@functools.cache
def _decoder() -> Any:
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), remat="full")
    # Weights of the usual initialisation hardly show in the logits.
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, state))
    return model


def unrolled(model: Any) -> Any:
    """The decoder with the weights of a scanned one, layer by layer."""
    state, other = parameters(model), Decoder(CONFIG, rngs=nnx.Rngs(0), scan_layers=False)
    layer = lambda i: jax.tree.map(lambda x: x[i], state["blocks"])
    nnx.update(other, state | {"blocks": {i: layer(i) for i in range(CONFIG.num_hidden_layers)}})
    return other


@nnx.jit
def step(model: Any, optimizer: Any) -> jax.Array:
    def loss(model: Any) -> jax.Array:
        labels = TOKENS[:, 1:]
        logits = model(TOKENS[:, :-1])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    of = nnx.DiffState(0, lro.adapters.trainable)
    value, gradient = nnx.value_and_grad(loss, argnums=of)(model)
    optimizer.update(model, gradient)
    return value


def trained(model: Any, steps: int = 3) -> list[float]:
    tx = optax.adam(3e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=lro.adapters.trainable)
    return [float(step(model, optimizer)) for _ in range(steps)]


def parameters(model: Any) -> dict:
    return nnx.to_pure_dict(nnx.state(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "where", "method"),
    [
        *(
            pytest.param(blocks, "up|down", method, id=f"blocks-{name}")
            for method, name in zip(METHODS, NAMES, strict=True)
            if name in IN_BLOCKS
        ),
        *(
            pytest.param(decoder, WHERE, method, id=f"decoder-{name}", marks=pytest.mark.full)
            for method, name in zip(METHODS, NAMES, strict=True)
        ),
    ],
)
def test_in_a_stack_it_starts_equal_trains_is_merged_and_leaves_the_weights(
    make: Any, where: str, method: Any
) -> None:
    model = make()
    kind, weights, start = type(model), parameters(model), np.asarray(logits_of(model))
    lro.adapters.attach(model, method, where, rngs=1)
    assert_close(logits_of(model), start, 800)
    losses = trained(model)
    assert losses[-1] < losses[0]
    adapted = np.asarray(logits_of(model))
    assert np.abs(adapted - start).max() > 0.01
    if method.changes_base:
        with lro.adapters.disabled(model):
            assert_close(logits_of(model), start, 800)
    before = parameters(model)
    lro.adapters.merge(model)
    merged = nnx.clone(model)
    lro.adapters.detach(merged)
    assert_close(logits_of(merged), adapted, 800)
    lro.adapters.unmerge(model)
    assert_close(parameters(model), before, 200)
    lro.adapters.detach(model)
    assert type(model) is type(merged) is kind
    assert_close(parameters(model), weights, 200)
    assert jax.tree.structure(parameters(merged)) == jax.tree.structure(weights)


@pytest.mark.slow
def test_detached_without_merging_the_weights_are_bit_for_bit_those_before() -> None:
    """For methods that do not change them."""
    model = blocks()
    weights = parameters(model)
    for method in METHODS:
        if not method.changes_base:
            lro.adapters.attach(model, method, "up|down", rngs=1)
            lro.adapters.detach(model)
            jax.tree.map(np.testing.assert_array_equal, weights, parameters(model))


@pytest.mark.full  # of other methods: test_nnx_stacks.py, test_nnx_switching.py
@pytest.mark.parametrize("method", [METHODS[0], METHODS[3]], ids=["pissa", "svfit"])
def test_layers_that_are_not_stacked_are_trained_the_same(method: Any) -> None:
    losses = []
    for model in (decoder(), unrolled(decoder())):
        lro.adapters.attach(model, method, WHERE, rngs=1)
        losses.append(trained(model))
    assert_close(np.array(losses[1]), np.array(losses[0]), 800, dtype=np.float32)


@pytest.mark.slow
def test_a_quantized_base_is_merged_but_not_given_back() -> None:
    model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
    x = np.eye(6, dtype=np.float32)
    before = np.asarray(model(x))
    lro.adapters.attach(model, PiSSA(rank=2, nf4_rounds=2), ".*", rngs=1)
    adapted = np.asarray(model(x))
    assert 1e-3 < np.abs(adapted - before).max() < 0.2  # NF4's error
    with pytest.raises(TypeError, match="cannot give the weight back"):
        lro.adapters.detach(model)
    assert_close(model(x), adapted)
    lro.adapters.merge(model)
    lro.adapters.detach(model)
    assert_close(model(x), adapted, 100)


@pytest.mark.slow
@pytest.mark.parametrize("residual", [True, False])
def test_a_strength_is_of_the_change_of_the_original_weights(residual: bool) -> None:
    layer, x = nnx.Linear(6, 5, rngs=nnx.Rngs(0)), np.eye(6, dtype=np.float32)
    before, kernel = np.asarray(layer(x)), np.asarray(layer.kernel[...])
    method = PiSSA(rank=2, alpha=4, residual=residual)
    lro.adapters.attach(layer, method, where=".*", rngs=0)
    arrays = layer.adapters["default"].arrays
    arrays["B"].set_value(jnp.asarray(np.asarray(arrays["B"][...]) + np.float32(0.3)))
    after = np.asarray(layer(x))
    for strength in (0.0, 0.25):
        lro.adapters.activate(layer, "default", strengths={"default": strength})
        expected = before + strength * (after - before)
        np.testing.assert_allclose(layer(x), expected, atol=2e-6)
        lro.adapters.merge(layer)
        np.testing.assert_allclose(layer(x), expected, atol=2e-6)
        lro.adapters.unmerge(layer)
        lro.adapters.activate(layer, "default")
    np.testing.assert_allclose(layer(x), after, atol=2e-6)
    lro.adapters.detach(layer)
    np.testing.assert_allclose(layer.kernel[...], kernel, atol=2e-6)
