"""The decoder with trained rotary positions, and with attention by random features."""

import dataclasses
from pathlib import Path

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.layers import RandomFeatures
from lowrank_optax.models import Decoder, RopeScaling, generate, save_huggingface
from tests.models.decoders import CONFIG, TOKENS, like, logits_of, random_decoder

FEATURES = RandomFeatures(num_features=16, chunk_size=5)
HEAD = CONFIG.head_dim


def with_rope_angles(model: Decoder, fresh: Decoder) -> Decoder:
    """The random decoder, whose angle matrices are those of a decoder just made."""
    angles = fresh.blocks.attention.comrope.angle_matrices[...]
    model.blocks.attention.comrope.angle_matrices.set_value(angles)
    return model


@pytest.fixture(scope="module")
def comrope() -> Decoder:
    fresh = Decoder(CONFIG, rngs=nnx.Rngs(0), position="comrope")
    return with_rope_angles(random_decoder(position="comrope"), fresh)


@pytest.fixture(scope="module")
def by_features() -> Decoder:
    return random_decoder(attention=FEATURES)


def test_a_fresh_comrope_decoder_is_rope_on_neighbouring_channels(comrope: Decoder) -> None:
    """With the channels of queries and keys in Hugging Face's order, it is the plain decoder."""
    order = np.concatenate([np.arange(0, HEAD, 2), np.arange(1, HEAD, 2)])
    state = nnx.to_pure_dict(nnx.state(comrope))
    del state["blocks"]["attention"]["comrope"]
    for name in ("query", "key"):
        layer = state["blocks"]["attention"][name]
        kernel = np.asarray(layer["kernel"])
        heads = kernel.reshape(*kernel.shape[:-1], -1, HEAD)
        layer["kernel"] = jnp.asarray(heads[..., order].reshape(kernel.shape))
    rope = random_decoder()
    nnx.update(rope, state)
    expected = np.asarray(logits_of(rope, TOKENS), np.float64)
    assert_close(logits_of(comrope, TOKENS), expected, units=128)


def test_angles_are_trained_by_masked_and_accumulated_updates(comrope: Decoder) -> None:
    model = nnx.clone(comrope)
    graphdef, params = nnx.split(model)
    angles = lambda tree: tree["blocks"]["attention"]["comrope"]["angle_matrices"][...]
    assert angles(params).shape == (2, 2, 2, 4, 4)
    is_angle = lambda path, _: "angle_matrices" in jax.tree_util.keystr(path)
    labels = jax.tree_util.tree_map_with_path(
        lambda path, x: "angles" if is_angle(path, x) else "rest", params
    )
    numbers = lro.weight_dimension_numbers(model)
    rest = lro.galore(1e-3, rank=4, weight_dimension_numbers=numbers)
    tx = optax.partition({"angles": optax.adam(1e-2), "rest": rest}, labels)
    tx = optax.MultiSteps(tx, every_k_schedule=2)

    def loss(params):
        logits = nnx.merge(graphdef, params)(TOKENS[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), (value, angles(gradient))

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=12))
    (after, _), (losses, gradients) = run(params)
    # What is symmetric in an angle matrix has no effect.
    assert_close(gradients[0], -np.asarray(gradients[0], np.float64).swapaxes(-1, -2))
    assert losses[-1] < losses[0]
    assert (gradients[0] == gradients[1]).all()  # the first of two micro-batches changed nothing
    moved = np.asarray(angles(after) - angles(params))
    assert_close(moved, -moved.swapaxes(-1, -2).astype(np.float64), size=1)
    assert np.abs(moved).max() > 0.01


def test_many_features_come_near_softmax(by_features: Decoder) -> None:
    mild = nnx.clone(by_features)  # the variance of features grows with the norms of queries
    for layer in (mild.blocks.attention.query, mild.blocks.attention.key):
        layer.kernel.set_value(0.5 * layer.kernel[...])
    plain = like(mild)
    exact = np.asarray(logits_of(plain, TOKENS), np.float64)
    errors = [
        np.abs(np.asarray(logits_of(like(mild, attention=features), TOKENS)) - exact).mean()
        for features in (RandomFeatures(num_features=8), RandomFeatures(num_features=2048))
    ]
    assert errors[1] < 0.35 * errors[0]
    assert errors[1] < 0.2 * np.abs(exact).mean()


def test_text_is_generated_with_a_cache_of_constant_size(by_features: Decoder) -> None:
    size = lambda length: sum(x.nbytes for x in jax.tree.leaves(by_features.init_cache(2, length)))
    assert size(1) == size(10**6) == 4 * 2 * 2 * 2 * (16 * (HEAD + 1) + 1)
    text = generate(by_features, jnp.asarray(TOKENS[:, :6]), 5, temperature=0)
    logits = logits_of(by_features, text[:, :-1])
    assert (logits[:, 5:].argmax(-1) == text[:, 6:]).all()
    listed = like(by_features, scan_layers=False, attention=FEATURES)
    assert_close(logits_of(listed, text[:, :-1]), np.asarray(logits, np.float64), units=128)


def test_cached_comrope_and_features_in_half_precision() -> None:
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "remat": "full"}
    options = {"position": "comrope", "attention": FEATURES}
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), **options, **types)
    assert model.blocks.attention.comrope.angle_matrices[...].dtype == jnp.float32
    precise = Decoder(CONFIG, rngs=nnx.Rngs(0), **options)
    to_float = lambda x: x.astype(jnp.float32)
    nnx.update(precise, jax.tree.map(to_float, nnx.state(model, nnx.Param)))
    exact = logits_of(precise, TOKENS)

    def decoded(model: Decoder, tokens: jax.Array) -> jax.Array:
        first, cache = model.decode(tokens[:, :7], model.init_cache(2, 12), 0)
        last, _ = model.decode(tokens[:, 7:], cache, 7)
        return jnp.concatenate([first, last], axis=1)

    halves = jax.jit(decoded)(model, TOKENS)
    np.testing.assert_allclose(halves, exact, atol=0.02 * float(jnp.abs(exact).max()))
    assert_close(jax.jit(decoded)(precise, TOKENS), np.asarray(exact, np.float64), units=128)


def test_what_cannot_be_is_refused(tmp_path: Path, comrope: Decoder) -> None:
    make = lambda config=CONFIG, **options: Decoder(config, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match="position must be 'rope' or 'comrope', got 'alibi'"):
        make(position="alibi")
    with pytest.raises(ValueError, match="attention must be 'softmax'"):
        make(attention="linear")
    scaled = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("linear", 2.0))
    with pytest.raises(ValueError, match="leave rope_scaling out"):
        make(scaled, position="comrope")
    windowed = dataclasses.replace(CONFIG, model_type="mistral", sliding_window=4)
    with pytest.raises(ValueError, match="sliding_window=4 is for softmax attention"):
        make(windowed, attention="random-features")
    with pytest.raises(ValueError, match="attention_implementation='xla' is for softmax"):
        make(attention="random-features", attention_implementation="xla")
    with pytest.raises(ValueError, match="num_features must be a positive integer, got 0"):
        RandomFeatures(num_features=0)
    with pytest.raises(ValueError, match="cannot hold position='comrope'"):
        save_huggingface(comrope, tmp_path / "model")
    assert not (tmp_path / "model").exists()
