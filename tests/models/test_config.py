"""The decoder's configuration: what it derives, what it reads, what it refuses."""

import json

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.models import PRESETS, Decoder, DecoderConfig, RopeScaling, decoder_config
from lowrank_optax.models.rotary import inverse_frequencies, rotary_angles, rotate

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_number_of_parameters_of_the_closed_formula(name):
    config = decoder_config(name)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    counted = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    d, width = config.hidden_size, config.intermediate_size
    layer = 4 * d * d + 3 * d * width + 2 * d
    assert counted == 2 * config.vocab_size * d + config.num_hidden_layers * layer + d


def test_the_galore_papers_models_have_the_sizes_they_are_named_after():
    millions = {}
    for name in PRESETS:
        config = decoder_config(name)
        model = nnx.eval_shape(lambda config=config: Decoder(config, rngs=nnx.Rngs(0)))
        total = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        millions[name.removeprefix("llama-")] = round(total / 1e6, 2)
    del millions["tiny"]
    expected = {"60m": 58.07, "130m": 134.11, "350m": 367.97, "1b": 1339.08, "7b": 6738.42}
    assert millions == expected


def test_overrides_of_a_preset_are_used_before_sizes_are_derived():
    config = decoder_config("llama-tiny", num_attention_heads=8, vocab_size=257)
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (8, 16, 257)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3},
        {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"model_type": "mistral", "sliding_window": 7, "num_key_value_heads": 1},
        {"model_type": "mistral", "eos_token_id": [1, 2]},
        {"model_type": "qwen2", "sliding_window": 7, "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "rope_theta": 1e6},
    ],
)
def test_a_configuration_survives_the_way_through_a_config_file(fields, tmp_path):
    config = DecoderConfig(**SIZES, **fields)
    (tmp_path / "config.json").write_text(json.dumps(config.to_huggingface()))
    assert DecoderConfig.from_huggingface(tmp_path) == config
    assert decoder_config(tmp_path / "config.json") == config
    assert hash(decoder_config(tmp_path)) == hash(config)
    assert decoder_config(tmp_path, vocab_size=9).vocab_size == 9


def test_the_rotary_layouts_of_transformers_4_and_5_mean_the_same():
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = {"rope_parameters": {"rope_theta": 5e5} | LLAMA3}
    read = [DecoderConfig.from_huggingface({"model_type": "llama"} | SIZES | x) for x in (old, new)]
    assert read[0] == read[1]
    assert read[0].rope_scaling == RopeScaling(**LLAMA3)
    sizes = SIZES | {"num_key_value_heads": 1}
    default = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    config = DecoderConfig.from_huggingface({"model_type": "mistral"} | sizes | default)
    assert (config.rope_theta, config.rope_scaling) == (5e5, None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model_type": "llama"}, {"num_key_value_heads": 4, "sliding_window": None}),
        ({"model_type": "llama", "sliding_window": 7}, {"sliding_window": None}),
        ({"model_type": "mistral"}, {"num_key_value_heads": 8, "sliding_window": 4096}),
        ({"model_type": "mistral", "sliding_window": None}, {"sliding_window": None}),
        ({"model_type": "qwen2", "sliding_window": 7}, {"sliding_window": None}),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3},
            {"sliding_window": None},
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["sliding_attention"] * 3,
            },
            {"sliding_window": 7, "head_dim": 128},
        ),
        ({"model_type": "llama", "max_sequence_length": 99}, {"max_position_embeddings": 99}),
    ],
)
def test_fields_left_out_take_hugging_faces_defaults(given, expected):
    sizes = SIZES | {"num_attention_heads": 8 if given["model_type"] == "mistral" else 4}
    if given["model_type"].startswith("qwen"):
        sizes |= {"num_key_value_heads": 2}
    config = DecoderConfig.from_huggingface(sizes | given)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size 32 is not divisible by num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"hidden_size": 32.0}, "hidden_size must be a positive integer, got 32.0"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number, got -1.0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"model_type": "gemma"}, "'gemma' is not supported; .* llama, mistral, qwen2, qwen3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'.*'linear' and 'llama3'"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "needs a positive number as factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor < high_freq"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is not an option"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias is not an option"),
        ({"sliding_window": 7}, "sliding_window is not an option of model_type 'llama'"),
    ],
)
def test_impossible_values_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**(SIZES | fields))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        (json.dumps(SIZES), "model_type None is not supported"),
        (json.dumps({"model_type": "llama", "vocab_size": 3}), "lacks hidden_size, intermediate"),
        (
            json.dumps({"model_type": "llama", "partial_rotary_factor": 0.5} | SIZES),
            "partial_rotary_factor must be 1, got 0.5",
        ),
        (
            json.dumps(
                {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1} | SIZES
            ),
            "mixes layers of the kinds full_attention, sliding_attention",
        ),
    ],
)
def test_unusable_files_are_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_huggingface(tmp_path)


WRONG = (["x"], float("nan"), float("inf"), -1, -1.5, "", "x", [], {}, {"x": 1})
# Values of another kind that are right: an empty object of rotary parameters, no last tokens.
RIGHT = {("rope_scaling", "{}"), ("rope_parameters", "{}"), ("eos_token_id", "[]")}


@pytest.mark.distinct
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_field_of_a_file_is_refused_by_name_or_right(model_type, tmp_path):
    content = SIZES | {"model_type": model_type, "num_key_value_heads": 2, "head_dim": 16}
    content |= {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": [2, 3]}
    content |= {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "initializer_range": 0.1}
    content |= {"hidden_act": "silu", "max_position_embeddings": 64, "partial_rotary_factor": 1.0}
    content |= {"attention_bias": True, "mlp_bias": True, "sliding_window": 7}
    content |= {"use_sliding_window": True, "max_window_layers": 0, "max_sequence_length": 64}
    content |= {"layer_types": ["sliding_attention"] * 3, "rope_scaling": LLAMA3}
    rotary = [("rope_scaling", name) for name in LLAMA3]
    expected = DecoderConfig.from_huggingface(content)
    file = tmp_path / "config.json"
    for path in [(name,) for name in (*content, "rope_parameters")] + rotary:
        for value in WRONG:
            inside = content.get(path[0], {}) | {path[1]: value} if len(path) > 1 else value
            file.write_text(json.dumps(content | {path[0]: inside}))
            found, error = outcome(file)
            if found is None:
                assert path[-1] in error, (path, value, error)
                assert str(file) in error
            else:
                assert found == expected or (path[-1], repr(value)) in RIGHT, (path, value)


def outcome(file):
    """The configuration, or what is the matter."""
    try:
        return DecoderConfig.from_huggingface(file), ""
    except ValueError as error:
        return None, str(error)


def test_unknown_names_paths_and_fields_are_refused():
    with pytest.raises(ValueError, match=r"'llama-2b' is neither a named .*llama-tiny"):
        decoder_config("llama-2b")
    with pytest.raises(ValueError, match=r"hidden: no field .* hidden_size"):
        decoder_config("llama-tiny", hidden=3)


def test_llama3_scaling_keeps_high_and_divides_low_frequencies():
    scaling = RopeScaling(**LLAMA3)
    plain = inverse_frequencies(128, 5e5).astype(np.float64)
    scaled = inverse_frequencies(128, 5e5, scaling).astype(np.float64)
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_array_equal(scaled[short], plain[short])
    assert_close(scaled[long], plain[long] / 8)
    between = (scaled / plain)[~short & ~long]
    assert between.size
    assert (np.diff(between) < 0).all()
    assert ((between > 1 / 8) & (between < 1)).all()
    linear = inverse_frequencies(128, 5e5, RopeScaling("linear", 4.0))
    assert_close(linear, plain / 4)


def test_rotary_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 1, 1, 1, 16)).astype(np.float32)
    frequencies = inverse_frequencies(16, 100.0)

    def product(query_position: int, key_position: int) -> float:
        turned = [
            rotate(jnp.asarray(x), rotary_angles(jnp.array([position]), frequencies))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(3, 1) == pytest.approx(product(40, 38), abs=1e-5)
    assert product(0, 0) == pytest.approx(float((query * key).sum()), abs=1e-5)
    assert abs(product(3, 1) - product(3, 2)) > 1e-2
    # The same, by hand: pair (i, i + 8) as a complex number, turned by position times frequency.
    q, k = (x[0, 0, 0, :8] + 1j * x[0, 0, 0, 8:] for x in (query, key))
    by_hand = (q * np.exp(2j * frequencies) * k.conj()).real.sum()
    assert product(3, 1) == pytest.approx(by_hand, abs=1e-5)
