"""The command: what it writes, and what it says of arguments and files that are wrong."""

import json
import subprocess
import sys

from close import assert_close
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax import cli
from lowrank_optax.adapters import load_peft, save_peft
from lowrank_optax.models import decoder_config, load_huggingface, save_huggingface
from tests.adapters.peft_files import query_folder, read, write
from tests.models.decoders import logits_of, random_decoder

pytest.importorskip("safetensors")

TOKENS = np.arange(8).reshape(1, 8)


def decoder(param_dtype=jnp.float32, **changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = decoder_config("llama-tiny", vocab_size=17, **(sizes | heads | changes))
    return random_decoder(config, param_dtype=param_dtype)


@pytest.fixture
def base(tmp_path):
    save_huggingface(decoder(), tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


def adapter(base, folder, method, where="query|up"):
    """An adapter's folder, and the outputs with it."""
    model = load_huggingface(base)
    lro.adapters.attach(model, method, where, rngs=0)
    arrays = model.blocks.attention.query.adapters["default"].arrays
    arrays["B"].set_value(jnp.asarray(np.asarray(arrays["B"][...]) + np.float32(0.3)))
    save_peft(model, folder, as_lora=None if isinstance(method, lro.adapters.LoRA) else False)
    return logits_of(model, TOKENS)


def run(*arguments):
    return cli.main(["convert", *map(str, arguments)])


def test_another_dtype(tmp_path):
    source = query_folder(tmp_path / "a", sparkle=3)
    assert run(source, tmp_path / "b", "--dtype", "bfloat16") == 0
    before, after = read(source), read(tmp_path / "b")
    assert after[0] == before[0]  # unknown fields too
    for name, x in before[1].items():
        assert after[1][name].dtype == jnp.bfloat16
        assert (after[1][name] == x.astype(jnp.bfloat16)).all()


def test_bone_is_renamed_to_miss(tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.{}_block"
    block = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(tmp_path / "a", {"peft_type": "BONE", "r": 2}, {name.format("bone"): block})
    assert run(tmp_path / "a", tmp_path / "b") == 0
    config, tensors = read(tmp_path / "b")
    assert config == {"peft_type": "MISS", "r": 2}
    assert (tensors[name.format("miss")] == block).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        lro.adapters.LoRA(rank=2, alpha=5, initial="random"),
        lro.adapters.LoRA(rank=2, alpha=3, rank_stabilized=True, initial="random"),
        lro.adapters.PiSSA(rank=2, alpha=5),
    ],
)
def test_plain_loras_give_the_same_outputs_at_alpha_equal_to_rank(base, tmp_path, method):
    expected = adapter(base, tmp_path / "a", method)
    assert run(tmp_path / "a", tmp_path / "b", "--plain-lora", "--base", base) == 0
    config = read(tmp_path / "b")[0]
    assert config["lora_alpha"] == config["r"]
    assert not config["use_rslora"]
    model = load_peft(load_huggingface(base), tmp_path / "b")
    assert_close(logits_of(model, TOKENS), expected, 200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "where"),
    [
        (lro.adapters.LoRA(rank=2, alpha=5, initial="random"), "query|up|embed|lm_head"),
        (lro.adapters.DoRA(rank=2, alpha=5), "query|output"),
        (lro.adapters.PiSSA(rank=2, alpha=5), "query|down"),
    ],
)
def test_a_merged_model_gives_the_adapters_outputs(base, tmp_path, method, where, capsys):
    expected = adapter(base, tmp_path / "a", method, where)
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 0
    assert "tensors changed" in capsys.readouterr().out
    assert_close(logits_of(load_huggingface(tmp_path / "m"), TOKENS), expected, 200)
    assert {p.name for p in (tmp_path / "m").iterdir()} == {p.name for p in base.iterdir()}


@pytest.mark.slow
def test_merging_rounds_a_bfloat16_base_once(tmp_path):
    small = decoder(param_dtype=jnp.bfloat16)
    save_huggingface(small, tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "a", lro.adapters.LoRA(rank=2, alpha=5), "query")
    assert run(tmp_path / "a", tmp_path / "m", "--base", tmp_path / "base", "--merge") == 0
    name = "model.layers.1.self_attn.q_proj"
    tensors = read(tmp_path / "a")[1]
    a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    weight = np.asarray(small.blocks.attention.query.kernel[...], np.float64)[1].T
    merged = np.asarray(load_huggingface(tmp_path / "m").blocks.attention.query.kernel[...])[1]
    assert merged.dtype == jnp.bfloat16
    exact = (weight + 2.5 * b @ a).astype(np.float32).T
    assert (merged == exact.astype(jnp.bfloat16)).mean() > 0.98  # but for ties


@pytest.mark.slow
def test_a_tied_embedding_is_not_merged_into(tmp_path, capsys):
    model = decoder(tie_word_embeddings=True)
    save_huggingface(model, tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "a", lro.adapters.LoRA(rank=2), "query|embed")
    assert run(tmp_path / "a", tmp_path / "m", "--base", tmp_path / "base", "--merge") == 1
    assert "ties its embedding and its head" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_an_adapter_of_another_model_is_refused_and_nothing_written(base, tmp_path, capsys):
    query_folder(tmp_path / "a")  # of three layers, and of other sizes
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 1
    error = capsys.readouterr().err
    assert error.startswith("lowrank-optax: error: ")
    assert "no model.layers.2.self_attn.q_proj.weight, which the adapter changes" in error
    config, tensors = read(tmp_path / "a")
    write(tmp_path / "a", config, {k: x for k, x in tensors.items() if ".2." not in k})
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 1
    error = capsys.readouterr().err
    assert "q_proj.weight is of shape (16, 16), and should be of shape (6, 4)" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["missing", "b"], "holds no adapter_config.json"),
        (["a", "a/adapter_config.json"], "is a file"),
        (["dora", "b", "--plain-lora"], "DoRA rescales"),
        (["pissa", "b", "--plain-lora"], "its base is needed"),
        (["kasa", "b", "--plain-lora"], "kasa_config="),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, match):
    query_folder(tmp_path / "a")
    query_folder(tmp_path / "dora", use_dora=True)
    query_folder(tmp_path / "pissa", init_lora_weights="pissa")
    query_folder(tmp_path / "kasa", kasa_config={"rank": 1})
    config, tensors = read(tmp_path / "dora")
    magnitudes = {
        k.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(6, np.float32)
        for k in tensors
        if "lora_A" in k
    }
    write(tmp_path / "dora", config, tensors | magnitudes)
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["a", "b", "--merge"], "--merge needs --base"),
        (["a", "b", "--merge", "--base", "c", "--dtype", "float32"], "keeps the base's dtype"),
        (["a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["a"], "the following arguments are required: TARGET"),
    ],
)
def test_wrong_arguments_are_said_with_the_usage(capsys, arguments, match):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert match in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "lowrank_optax.cli", "convert", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "lowrank-optax convert SOURCE TARGET --base MODEL --merge" in done.stdout


@pytest.mark.slow
def test_a_sharded_base_stays_readable(base, tmp_path):
    save_huggingface(load_huggingface(base), base, max_shard_bytes=3000)
    assert len(json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]) > 5
    expected = adapter(base, tmp_path / "a", lro.adapters.LoRA(rank=2, alpha=5))
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 0
    merged = load_huggingface(tmp_path / "m")
    assert_close(logits_of(merged, TOKENS), expected, 200)
