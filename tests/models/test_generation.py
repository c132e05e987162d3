"""Sampling equals what full forward passes say."""

from close import assert_close
import jax
import numpy as np
import pytest

from lowrank_optax.models import Decoder, DecoderConfig, generate
from lowrank_optax.models.generation import _generate
from tests.models.decoders import logits_of, random_decoder

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
PROMPT = np.random.default_rng(1).integers(0, 61, (3, 5), dtype=np.int32)


def make(scan_layers: bool = True, **fields) -> Decoder:
    return random_decoder(DecoderConfig(**(SIZES | fields)), scan_layers=scan_layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: make(), id="scanned"),
        pytest.param(lambda: make(scan_layers=False), id="unrolled"),
        pytest.param(lambda: make(model_type="mistral", sliding_window=3), id="window"),
        pytest.param(lambda: make(model_type="qwen3", tie_word_embeddings=True), id="qwen3"),
    ],
)
def test_greedy_generation_equals_the_argmax_of_full_forwards(model):
    model = model()
    tokens = np.asarray(generate(model, PROMPT, 9, temperature=0))
    assert tokens.shape == (3, 14)
    np.testing.assert_array_equal(tokens[:, :5], PROMPT)
    # Causal: one pass over the result gives the logits of every step at once.
    logits = np.asarray(logits_of(model, tokens))[:, 4:-1]
    chosen = np.take_along_axis(logits, tokens[:, 5:, None], axis=-1)[..., 0]
    assert_close(chosen, logits.max(axis=-1), 100)
    assert len(np.unique(tokens[:, 5:])) > 3


def test_cached_logits_equal_full_ones():
    model = make()
    tokens = np.random.default_rng(2).integers(0, 61, (2, 8), dtype=np.int32)
    cache = model.init_cache(2, 10)
    decode = jax.jit(lambda model, *arguments: model.decode(*arguments))
    parts = []
    for start in (0, 4):
        logits, cache = decode(model, tokens[:, start : start + 4], cache, start)
        parts.append(np.asarray(logits))
    assert not np.any(np.asarray(cache.keys)[:, :, 8:])
    assert_close(np.concatenate(parts, axis=1), logits_of(model, tokens), 100)


@pytest.mark.slow
def test_samples_follow_the_models_distribution():
    model = make(vocab_size=7, initializer_range=0.15, num_hidden_layers=1)
    prompt = np.tile(np.int32([[1, 2]]), (4_000, 1))
    tokens = np.asarray(generate(model, prompt, 2, key=jax.random.key(0), temperature=0.7))

    def chances(likely: int) -> np.ndarray:
        """Of the token after each of 1, 2 and a third one."""
        logits = np.asarray(logits_of(model, np.int32([[1, 2, likely]])), np.float64)[0]
        sizes = np.exp(logits / 0.7)
        return sizes / sizes.sum(axis=-1, keepdims=True)

    first = chances(0)[1]
    counted = np.bincount(tokens[:, 2], minlength=7) / len(prompt)
    # Five standard deviations of a frequency.
    assert np.all(np.abs(counted - first) < 5 * np.sqrt(0.25 / len(prompt)))
    assert first.max() < 0.9
    likely = int(np.argmax(first))
    after = tokens[tokens[:, 2] == likely, 3]
    counted = np.bincount(after, minlength=7) / len(after)
    assert np.all(np.abs(counted - chances(likely)[2]) < 5 * np.sqrt(0.25 / len(after)))


def test_the_key_alone_decides_the_sample():
    model = make()
    draw = [
        np.asarray(generate(model, PROMPT, 6, key=jax.random.key(k), temperature=1.0))
        for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()


def test_another_temperature_or_other_weights_compile_nothing_anew():
    model, key = make(), jax.random.key(0)
    generate(model, PROMPT, 4, key=key, temperature=1.0)
    compiled = _generate._cache_size()
    model.norm.scale.set_value(model.norm.scale[...] * 2)
    generate(model, PROMPT, 4, key=jax.random.key(7), temperature=0.3)
    assert _generate._cache_size() == compiled


def test_no_new_tokens_return_the_prompt():
    np.testing.assert_array_equal(generate(make(), PROMPT, 0, temperature=0), PROMPT)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((PROMPT[0], 3), {"temperature": 0}, r"prompt must be integers of shape .* \(5,\)"),
        ((PROMPT[:, :0], 3), {"temperature": 0}, r"at least one token, got int32 of shape \(3, 0"),
        ((PROMPT, -1), {"temperature": 0}, "max_new_tokens must not be negative, got -1"),
        ((PROMPT, 3), {"temperature": -0.5}, "temperature must not be negative, got -0.5"),
        ((PROMPT, 3), {"temperature": 0.5}, "sampling at temperature 0.5 needs a key"),
    ],
)
def test_impossible_requests_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        generate(make(), *arguments, **options)
