"""Checkpoints: the same logits as transformers, both ways, and what is refused."""

import json
from pathlib import Path
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.models import (
    CheckpointMismatchError,
    Decoder,
    DecoderConfig,
    decoder_config,
    load_huggingface,
    save_huggingface,
)
from tests.models.decoders import logits_of, random_decoder

safetensors_numpy = pytest.importorskip("safetensors.numpy")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    # Ten times the usual: logits of order one, and biases and norms that matter.
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_grouped_llama3_rope": {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "rope_theta": 5e5,
        "rope_scaling": LLAMA3_ROPE,
    },
    "llama_biases_linear_rope": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "mistral_window": {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "rope_theta": 1e6},
    "qwen2_window": {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 7},
    "qwen3_tied": {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
}
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 24))


@pytest.fixture
def torch():
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")


def torch_logits(torch, model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def jax_logits(model: Decoder) -> np.ndarray:
    return np.asarray(logits_of(model, TOKENS))


def perturbed(torch, model):
    """Norms and biases are one and zero at the start, which would hide a mistake in them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.filterwarnings("default")  # transformers' and torch's own
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers_both_ways(family, tmp_path, torch):
    import transformers

    config = DecoderConfig(**(SIZES | FAMILIES[family]))
    torch.manual_seed(0)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(config.to_huggingface()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "config")
    theirs = perturbed(torch, transformers.AutoModelForCausalLM.from_config(theirs))
    expected = torch_logits(torch, theirs)

    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_huggingface(tmp_path / "theirs")
    # transformers writes its own beginning and end of text.
    token_ids = {"bos_token_id": ours.config.bos_token_id, "eos_token_id": ours.config.eos_token_id}
    assert ours.config == DecoderConfig(**(SIZES | FAMILIES[family] | token_ids))
    logits = jax_logits(ours)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(expected).max() > 0.5

    unrolled = load_huggingface(tmp_path / "theirs", scan_layers=False)
    np.testing.assert_allclose(jax_logits(unrolled), expected, atol=1e-4, rtol=1e-4)

    save_huggingface(ours, tmp_path / "ours", max_shard_bytes=10_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    ).eval()
    np.testing.assert_array_equal(torch_logits(torch, back), expected)
    print(f"{family}: largest difference {np.abs(logits - expected).max():.1e}")


@pytest.mark.filterwarnings("default")
def test_bfloat16_logits_are_near_those_of_transformers(tmp_path, torch):
    import transformers

    config = DecoderConfig(**(SIZES | FAMILIES["qwen3_tied"]))
    save_huggingface(random_decoder(config, param_dtype=jnp.bfloat16), tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.bfloat16
    ).eval()
    expected = torch_logits(torch, model.float())
    logits = jax_logits(load_huggingface(tmp_path / "m"))
    # Two to the minus eighth, over a few roundings.
    assert np.abs(logits - expected).mean() < 0.02 * np.abs(expected).mean() + 1e-3


@pytest.mark.filterwarnings("default")
def test_a_head_that_differs_from_its_tied_embedding_is_used_as_in_transformers(tmp_path, torch):
    import transformers

    save_huggingface(random_decoder(decoder_config("llama-tiny", **SIZES)), tmp_path / "m")
    content = json.loads((tmp_path / "m" / "config.json").read_text())
    content["tie_word_embeddings"] = True
    (tmp_path / "m" / "config.json").write_text(json.dumps(content))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32
    ).eval()
    logits = jax_logits(load_huggingface(tmp_path / "m"))
    np.testing.assert_allclose(logits, torch_logits(torch, model), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_decoder(decoder_config("llama-tiny", **SIZES))


def parameters(model: Decoder) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in flat}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("param_dtype", "scan_layers", "max_shard_bytes"),
    [
        (jnp.float32, True, 5 * 2**30),
        (jnp.float32, False, 9_000),
        (jnp.bfloat16, True, 9_000),
        (jnp.float16, False, 5 * 2**30),
    ],
)
def test_weights_and_dtypes_survive_saving(param_dtype, scan_layers, max_shard_bytes, tmp_path):
    config = decoder_config("llama-tiny", **SIZES)
    model = random_decoder(config, param_dtype=param_dtype, scan_layers=scan_layers)
    save_huggingface(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    loaded = load_huggingface(tmp_path / "m", scan_layers=scan_layers)
    assert loaded.config == config
    assert loaded.dtype == param_dtype
    expected, found = parameters(model), parameters(loaded)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].dtype == param_dtype
        np.testing.assert_array_equal(found[name], value)


def test_shards_hold_at_most_what_was_asked_and_are_listed_in_the_index(model, tmp_path):
    save_huggingface(model, tmp_path / "m", max_shard_bytes=9_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    total = 0
    for file in files:
        tensors = safetensors_numpy.load_file(tmp_path / "m" / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        assert sum(t.nbytes for t in tensors.values()) <= 9_000
        total += sum(t.nbytes for t in tensors.values())
    assert index["metadata"]["total_size"] == total


def test_a_tensor_is_stored_transposed_under_its_layers_name(model, tmp_path):
    save_huggingface(model, tmp_path / "m")
    stored = safetensors_numpy.load_file(tmp_path / "m" / "model.safetensors")
    np.testing.assert_array_equal(
        stored["model.layers.2.mlp.down_proj.weight"], model.blocks.mlp.down.kernel[2].T
    )
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], model.embed.embedding[...])


def test_loading_casts_on_request(model, tmp_path):
    save_huggingface(model, tmp_path / "m")
    loaded = load_huggingface(tmp_path / "m", dtype=jnp.float32, param_dtype=jnp.bfloat16)
    assert loaded.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(nnx.state(loaded))} == {jnp.dtype(jnp.bfloat16)}


def test_names_and_shapes_that_do_not_fit_are_all_listed(model, tmp_path):
    folder = tmp_path / "m"
    save_huggingface(model, folder)
    file = folder / "model.safetensors"
    tensors = safetensors_numpy.load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # harmless
    safetensors_numpy.save_file(tensors, file)
    with pytest.raises(CheckpointMismatchError) as caught:
        load_huggingface(folder)
    error = caught.value
    assert error.missing == ["model.layers.1.self_attn.k_proj.weight"]
    assert error.extra == ["model.layers.3.mlp.up_proj.weight"]
    assert error.wrong_shape == {"model.norm.weight": ((31,), (32,))}
    assert error.wrong_dtype == {"lm_head.weight": "I8"}
    for part in (*error.missing, *error.extra, "model.norm.weight (31,), not (32,)", "I8"):
        assert part in str(error)


def test_harmless_extras_are_ignored(tmp_path):
    config = decoder_config("llama-tiny", **SIZES, tie_word_embeddings=True)
    model = random_decoder(config)
    save_huggingface(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = safetensors_numpy.load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    safetensors_numpy.save_file(tensors, file)
    np.testing.assert_array_equal(jax_logits(load_huggingface(tmp_path / "m")), jax_logits(model))


def test_a_head_that_differs_from_its_tied_embedding_is_used_with_a_warning(tmp_path):
    config = decoder_config("llama-tiny", **SIZES)
    model = random_decoder(config)
    save_huggingface(model, tmp_path / "m")
    content = json.loads((tmp_path / "m" / "config.json").read_text())
    content["tie_word_embeddings"] = True
    (tmp_path / "m" / "config.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"tie_word_embeddings.*lm_head\.weight.*differ"):
        loaded = load_huggingface(tmp_path / "m")
    assert loaded.config == config
    np.testing.assert_array_equal(jax_logits(loaded), jax_logits(model))
    file = tmp_path / "m" / "model.safetensors"
    tensors = safetensors_numpy.load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    safetensors_numpy.save_file(tensors, file)
    with pytest.raises(CheckpointMismatchError) as caught:
        load_huggingface(tmp_path / "m")
    assert caught.value.wrong_shape == {"lm_head.weight": ((60, 32), (61, 32))}


@pytest.mark.parametrize("max_shard_bytes", [5 * 2**30, 9_000])
def test_damaged_and_missing_files_are_named(model, max_shard_bytes, tmp_path):
    folder = tmp_path / "m"
    save_huggingface(model, folder, max_shard_bytes=max_shard_bytes)
    files = sorted(folder.glob("*.safetensors"))
    files[-1].write_bytes(files[-1].read_bytes()[:-7])
    if len(files) > 1:
        files[0].unlink()
    with pytest.raises(CheckpointMismatchError, match="unusable files") as caught:
        load_huggingface(folder)
    assert caught.value.files.keys() == {files[-1].name, files[0].name}
    assert len(files) == 1 or caught.value.files[files[0].name] == "missing"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "no index"),
        ("{}", "no index"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "not a file name"),
    ],
)
def test_a_damaged_index_is_refused(model, index, message, tmp_path):
    save_huggingface(model, tmp_path / "m", max_shard_bytes=9_000)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointMismatchError, match=message):
        load_huggingface(tmp_path / "m")


def test_folders_without_a_model_are_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_huggingface(tmp_path)
    save_huggingface(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_huggingface(tmp_path / "m")


def test_folders_of_something_else_say_what_to_do(model, tmp_path):
    folder = tmp_path / "m"
    save_huggingface(model, folder)
    file = folder / "model.safetensors"
    tensors = safetensors_numpy.load_file(file)
    bare = {k.removeprefix("model."): x for k, x in tensors.items() if k != "lm_head.weight"}
    safetensors_numpy.save_file(bare, file)
    with pytest.raises(CheckpointMismatchError, match=r"lack the prefix 'model\.'.* save it again"):
        load_huggingface(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"but pytorch_model\.bin: a pickle.*save_pretrained"
    ):
        load_huggingface(folder)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"an adapter is there.*load_peft"):
        load_huggingface(tmp_path)


def test_a_tensor_in_two_shards_is_refused(model, tmp_path):
    folder = tmp_path / "m"
    save_huggingface(model, folder, max_shard_bytes=9_000)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    tensors = safetensors_numpy.load_file(first)
    name = next(iter(tensors))
    both = safetensors_numpy.load_file(second) | {name: tensors[name] + 1}
    safetensors_numpy.save_file(both, second)
    with pytest.raises(CheckpointMismatchError, match="damaged, truncated or missing") as caught:
        load_huggingface(folder)
    assert caught.value.files == {second.name: f"it holds {name}, and so does {first.name}"}


def test_a_save_that_fails_leaves_the_earlier_one(model, tmp_path, monkeypatch):
    folder = tmp_path / "m"
    save_huggingface(model, folder)
    before = folder_bytes(folder)
    real_save, calls = safetensors_numpy.save_file, []

    def failing_save(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError("the disk is full")
        real_save(*arguments, **options)

    monkeypatch.setattr(safetensors_numpy, "save_file", failing_save)
    with pytest.raises(OSError, match="the disk is full"):
        save_huggingface(model, folder, max_shard_bytes=9_000)
    assert folder_bytes(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_saving_again_replaces_the_model_and_keeps_other_files(model, tmp_path):
    folder = tmp_path / "new" / "m"
    save_huggingface(model, folder, max_shard_bytes=9_000)
    (folder / "tokenizer.json").write_text("{}")
    other = nnx.clone(model)
    other.norm.scale.set_value(-model.norm.scale[...])
    save_huggingface(other, folder)
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["m"]
    assert not np.array_equal(jax_logits(load_huggingface(folder)), jax_logits(model))


def test_other_folders_and_files_are_not_overwritten(model, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="holds other things than a model"):
        save_huggingface(model, tmp_path / "work")
    with pytest.raises(FileExistsError, match="is a file"):
        save_huggingface(model, tmp_path / "work" / "thesis.tex")
    assert folder_bytes(tmp_path / "work") == {"thesis.tex": b"years"}


def test_a_model_with_other_parameters_is_not_saved(model, tmp_path):
    model = nnx.clone(model)
    model.extra = nnx.Param(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"foreign: extra.*merge or detach"):
        save_huggingface(model, tmp_path / "m")
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        save_huggingface(model, tmp_path / "m", max_shard_bytes=0)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_safetensors_is_one_sentence(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"need safetensors: pip install 'lowrank_optax\[exa"):
        save_huggingface(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
