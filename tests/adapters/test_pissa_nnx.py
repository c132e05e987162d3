"""PiSSA and SVFit in the scanned and the unrolled decoder."""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.models import Decoder, decoder_config

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
TOKENS = jnp.arange(12).reshape(2, 6)
METHODS = [
    PiSSA(rank=3, alpha=6),
    PiSSA(rank=3, alpha=6, residual=False),
    PiSSA(rank=(1, 3)),
    SVFit(rank=3),
    SVFit(energy=0.5),
]
NAMES = ["pissa", "pissa-free", "pissa-ranks", "svfit", "svfit-energy"]
logits_of = nnx.jit(lambda model: model(TOKENS))


def decoder() -> Any:
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


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_in_a_stack_it_starts_equal_trains_and_leaves_the_weights(method: Any) -> None:
    model = decoder()
    weights, start = parameters(model), logits_of(model)
    lro.adapters.attach(model, method, "attention|mlp", rngs=1)
    tolerance = 2e-4 if method.changes_base else 1e-6
    np.testing.assert_allclose(logits_of(model), start, atol=tolerance)
    losses = trained(model)
    assert losses[-1] < losses[0]
    assert np.abs(logits_of(model) - start).max() > 0.01
    with lro.adapters.disabled(model):
        np.testing.assert_allclose(logits_of(model), start, atol=tolerance)
    lro.adapters.detach(model)
    assert type(model) is Decoder
    given_back = parameters(model)
    same = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6 if method.changes_base else 0)
    jax.tree.map(same, weights, given_back)


@pytest.mark.parametrize("method", METHODS[:4], ids=NAMES[:4])
def test_merged_and_detached_it_computes_the_same(method: Any) -> None:
    model = decoder()
    structure = jax.tree.structure(parameters(model))
    lro.adapters.attach(model, method, "query|value|down", rngs=1)
    trained(model)
    adapted = logits_of(model)
    lro.adapters.merge(model)
    np.testing.assert_allclose(logits_of(model), adapted, atol=2e-4)
    lro.adapters.unmerge(model)
    np.testing.assert_allclose(logits_of(model), adapted, atol=2e-4)
    lro.adapters.merge(model)
    lro.adapters.detach(model)
    assert jax.tree.structure(parameters(model)) == structure
    np.testing.assert_allclose(logits_of(model), adapted, atol=2e-4)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[3]], ids=["pissa", "svfit"])
def test_layers_that_are_not_stacked_are_trained_the_same(method: Any) -> None:
    losses = []
    for model in (decoder(), unrolled(decoder())):
        lro.adapters.attach(model, method, "query|value", rngs=1)
        losses.append(trained(model))
    np.testing.assert_allclose(*losses, atol=2e-4)


def test_a_quantized_base_is_merged_but_not_given_back() -> None:
    model = decoder()
    lro.adapters.attach(model, PiSSA(rank=3, nf4_rounds=2), "query|value", rngs=1)
    trained(model)
    adapted = logits_of(model)
    with pytest.raises(TypeError, match="cannot give the weight back"):
        lro.adapters.detach(model)
    np.testing.assert_array_equal(logits_of(model), adapted)
    lro.adapters.merge(model)
    lro.adapters.detach(model)
    np.testing.assert_allclose(logits_of(model), adapted, atol=2e-4)


@pytest.mark.parametrize("residual", [True, False])
def test_a_strength_is_of_the_change_of_the_original_weights(residual: bool) -> None:
    layer, x = nnx.Linear(6, 5, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (4, 6))
    before, kernel = layer(x), layer.kernel[...]
    method = PiSSA(rank=2, alpha=4, residual=residual)
    lro.adapters.attach(layer, method, where=".*", rngs=0)
    arrays = layer.adapters["default"].arrays
    arrays["B"].set_value(arrays["B"][...] + 0.3)
    after = layer(x)
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
