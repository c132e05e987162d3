"""The command: what it writes, and what it says of arguments and files that are wrong."""

import json
import re
import shutil
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
from tests.adapters.peft_files import query_folder, random_tensors, read, write
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


def test_a_merged_model_has_no_weights_of_the_base_in_other_formats(base, tmp_path):
    files = (
        "flax_model.msgpack", "tf_model.h5", "pytorch_model.bin", "pytorch_model.bin.index.json",
        "consolidated.00.pth", "model.gguf", "model.onnx", "model.ckpt.index",
    )  # fmt: skip
    before = {p.name for p in base.iterdir()}
    for name in files:
        (base / name).write_text("{}")
    adapter(base, tmp_path / "a", lro.adapters.LoRA(rank=2), "query")
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 0
    assert {p.name for p in (tmp_path / "m").iterdir()} == before


def test_an_adapter_of_another_model_is_refused_and_nothing_written(base, tmp_path, capsys):
    query_folder(tmp_path / "a")  # of three layers, and of other sizes
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 1
    error = capsys.readouterr().err
    assert error.startswith("lowrank-optax: error: ")
    assert re.search(r"extra \(2\): \S*model\.layers\.2\.self_attn\.q_proj\.lora_A\.weight", error)
    assert re.search(r"wrong shape .*q_proj\.lora_A\.weight \(2, 4\), not \(2, 16\)", error)
    config, tensors = read(tmp_path / "a")
    some = {k: x for k, x in tensors.items() if ".2." not in k and ".1." not in k}
    write(tmp_path / "a", config, some)  # a layer is missing, too
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 1
    assert re.search(r"missing \(2\): \S*layers\.1\.self_attn\.q_proj", capsys.readouterr().err)
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


def folder_of(folder, config, tensors):
    """A base model's folder, by nothing of this library."""
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gpt2(folder, **config):
    shapes = {
        "transformer.wte.weight": (9, 4),
        "transformer.wpe.weight": (5, 4),
        "transformer.h.0.attn.c_attn.weight": (4, 12),
        "transformer.h.0.attn.c_proj.weight": (4, 4),
        "transformer.h.0.attn.c_proj.bias": (4,),
    }
    config = {"model_type": "gpt2", "vocab_size": 9, "architectures": ["GPT2LMHeadModel"], **config}
    return folder_of(folder, config, random_tensors(shapes, seed=1))


def loras(modules, rank=2):
    """Tensors of an adapter: names of modules to (inputs, outputs)."""
    shapes = {}
    for module, (d_in, d_out) in modules.items():
        name = f"base_model.model.{module}"
        shapes |= {f"{name}.lora_A.weight": (rank, d_in), f"{name}.lora_B.weight": (d_out, rank)}
    return random_tensors(shapes)


def product_of(tensors, module):
    name = f"base_model.model.{module}.lora_{{}}.weight"
    return tensors[name.format("B")].astype(np.float64) @ tensors[name.format("A")]


@pytest.mark.parametrize("fan_in_fan_out", [True, None])
def test_square_weights_of_gpt2_are_merged_as_they_are_stored(tmp_path, fan_in_fan_out):
    base = gpt2(tmp_path / "base")
    c_attn, c_proj = (f"transformer.h.0.attn.{name}" for name in ("c_attn", "c_proj"))
    tensors = loras({c_attn: (4, 12), c_proj: (4, 4)})
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"]}
    if fan_in_fan_out is not None:  # PEFT sets it by itself where it is left out
        config["fan_in_fan_out"] = fan_in_fan_out
    write(tmp_path / "a", config, tensors)
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 0
    before, after = (tensors_of(folder) for folder in (base, tmp_path / "m"))
    for module in (c_attn, c_proj):
        change = after[f"{module}.weight"] - before[f"{module}.weight"]
        assert_close(change, 1.5 * product_of(tensors, module).T, 20)


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_the_type_of_the_base_says_which_layers_are_transposed(tmp_path, fan_in_fan_out):
    q_proj, score = "model.layers.0.self_attn.q_proj", "score"
    shapes = {f"{module}.weight": (4, 4) for module in (q_proj, score)}
    llama = folder_of(tmp_path / "llama", {"model_type": "llama"}, random_tensors(shapes))
    c_proj = "transformer.h.0.attn.c_proj"
    shapes = {f"{module}.weight": (4, 4) for module in (c_proj, score)}
    gpt2 = folder_of(tmp_path / "gpt2", {"model_type": "gpt2"}, random_tensors(shapes))
    for base, transposed in ((llama, ()), (gpt2, (c_proj,))):
        before = tensors_of(base)
        modules = [name.removesuffix(".weight") for name in before]
        config = {"r": 2, "lora_alpha": 3, "fan_in_fan_out": fan_in_fan_out}
        targets = [module.rpartition(".")[2] for module in modules]
        tensors = loras({module: (4, 4) for module in modules})
        write(tmp_path / "a", config | {"target_modules": targets}, tensors)
        assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 0
        after = tensors_of(tmp_path / "m")
        for module in modules:
            change = 1.5 * product_of(tensors, module)
            expected = change.T if module in transposed else change
            assert_close(after[f"{module}.weight"] - before[f"{module}.weight"], expected, 20)


def tensors_of(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_an_embeddings_own_base_is_merged_and_kept(base, tmp_path):
    name = "base_model.model.model.embed_tokens"
    shapes = {
        f"{name}.lora_embedding_A": (2, 17),
        f"{name}.lora_embedding_B": (16, 2),
        f"{name}.base_layer.weight": (17, 16),
    }
    tensors = random_tensors(shapes)
    write(tmp_path / "a", {"r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]}, tensors)
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 0
    a, b, own = (tensors[n].astype(np.float64) for n in shapes)
    assert_close(tensors_of(tmp_path / "m")["model.embed_tokens.weight"], own + (b @ a).T, 20)
    for more in ([], ["--base", base]):
        assert run(tmp_path / "a", tmp_path / "p", "--plain-lora", *more) == 0
        kept = read(tmp_path / "p")[1][f"{name}.base_layer.weight"]
        assert (kept == tensors[f"{name}.base_layer.weight"]).all()
    expected = logits_of(load_peft(load_huggingface(base), tmp_path / "a"), TOKENS)
    assert_close(logits_of(load_huggingface(tmp_path / "m"), TOKENS), expected, 200)


def test_trained_biases_are_merged_and_kept(tmp_path):
    base, module = gpt2(tmp_path / "base"), "transformer.h.0.attn.c_proj"
    bias = {f"base_model.model.{module}.base_layer.bias": np.arange(4, dtype=np.float32)}
    tensors = loras({module: (4, 4)}) | bias
    write(tmp_path / "a", {"r": 2, "target_modules": ["c_proj"], "bias": "all"}, tensors)
    assert run(tmp_path / "a", tmp_path / "p", "--plain-lora") == 0
    config, plain = read(tmp_path / "p")
    assert config["bias"] == "all"
    assert all((plain[name] == x).all() for name, x in bias.items())
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 0
    assert (tensors_of(tmp_path / "m")[f"{module}.bias"] == np.arange(4)).all()


def test_a_head_that_is_tied_by_the_types_default_is_not_changed_with_the_embedding(
    tmp_path, capsys
):
    name = "base_model.model.transformer.wte"
    shapes = {f"{name}.lora_embedding_A": (2, 9), f"{name}.lora_embedding_B": (4, 2)}
    adapter = write(tmp_path / "a", {"r": 2, "target_modules": ["wte"]}, random_tensors(shapes))
    tied = gpt2(tmp_path / "base")
    assert run(adapter, tmp_path / "m", "--base", tied, "--merge") == 1
    assert "transformer.wte: the base model ties its embedding" in capsys.readouterr().err
    untied = gpt2(tmp_path / "untied", tie_word_embeddings=False)
    assert run(adapter, tmp_path / "m", "--base", untied, "--merge") == 0
    tensors = tensors_of(tied) | {"lm_head.weight": np.ones((9, 4), np.float32)}
    other = folder_of(tmp_path / "o", json.loads((tied / "config.json").read_text()), tensors)
    assert run(adapter, tmp_path / "n", "--base", other, "--merge") == 0
    same = tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}
    again = folder_of(tmp_path / "s", json.loads((tied / "config.json").read_text()), same)
    assert run(adapter, tmp_path / "m", "--base", again, "--merge") == 1


def test_another_table_with_as_many_rows_is_no_head(tmp_path, capsys):
    shapes = {"transformer.wpe.weight": (9, 4), "transformer.wte.weight": (9, 4)}
    tables = random_tensors(shapes, seed=2)
    config = {"model_type": "gpt2", "vocab_size": 9, "architectures": ["GPT2LMHeadModel"]}
    heads = (None, 9), ("lm_head", 9), ("embed_out", 9), ("output", 9), ("lm_head", 8)
    for number, (head, rows) in enumerate(heads):
        others = {f"{head}.weight": np.ones((rows, 4), np.float32)} if head else {}
        base = folder_of(tmp_path / str(number), config, tables | others)
        name = "base_model.model.transformer.wte"
        shapes = {f"{name}.lora_embedding_A": (2, 9), f"{name}.lora_embedding_B": (4, 2)}
        write(tmp_path / "a", {"r": 2, "target_modules": ["wte"]}, random_tensors(shapes))
        status = run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge")
        assert status == (0 if head else 1), head
    assert "transformer.wte: the base model ties its embedding" in capsys.readouterr().err


def test_a_tied_embedding_that_is_trained_with_its_head_is_merged(tmp_path, capsys):
    module, table = "transformer.h.0.attn.c_proj", np.ones((9, 4), np.float32)
    tensors = loras({module: (4, 4)})
    tensors |= {"base_model.model.transformer.wte.weight": table}
    config = {"r": 2, "target_modules": ["c_proj"], "modules_to_save": ["wte"]}
    write(tmp_path / "a", config, tensors)
    base = gpt2(tmp_path / "base")
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 1
    assert "modules_to_save has transformer.wte alone" in capsys.readouterr().err
    write(tmp_path / "a", config | {"ensure_weight_tying": True}, tensors)
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 0
    assert (tensors_of(tmp_path / "m")["transformer.wte.weight"] == table).all()
    tensors |= {"base_model.model.lm_head.weight": 2 * table}
    write(tmp_path / "a", config | {"ensure_weight_tying": True}, tensors)
    assert run(tmp_path / "a", tmp_path / "n", "--base", base, "--merge") == 1
    assert "tied, but differ" in capsys.readouterr().err


def test_a_quantized_base_is_refused_by_the_word(base, tmp_path, capsys):
    name = "model.layers.0.self_attn.q_proj.weight"
    header = json.dumps({name: {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}})
    fp8 = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    for number, (changes, content) in enumerate(
        (({"quantization_config": {"quant_method": "gptq"}}, None), ({}, fp8))
    ):
        folder = tmp_path / f"quantized{number}"
        shutil.copytree(base, folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        if content:
            (folder / "model.safetensors").write_bytes(content)
        query_folder(tmp_path / "a")
        for arguments in (["--merge"], ["--plain-lora"]):
            assert run(tmp_path / "a", tmp_path / "m", "--base", folder, *arguments) == 1
            error = capsys.readouterr().err
            assert re.search(r"is quantized \(.*gptq|is quantized \(.*F8_E4M3", error), error
        with pytest.raises(ValueError, match=r"is quantized .*dequantize"):
            load_huggingface(folder)
    assert not (tmp_path / "m").exists()


def test_an_adapter_whose_tensors_are_others_than_it_says_is_not_converted(tmp_path, capsys):
    query_folder(tmp_path / "a")
    config, tensors = read(tmp_path / "a")
    for changes, match in (
        ({"target_modules": ["v_proj"]}, "target_modules of .* 'v_proj'.* it has q_proj"),
        ({"r": 3}, r"wrong shape .*\(2, 4\), not \(3, 4\)"),
        ({"target_modules": ["0.self_attn.q_proj"]}, r"extra \(4\)"),
    ):
        write(tmp_path / "a", config | changes, tensors)
        assert run(tmp_path / "a", tmp_path / "p", "--plain-lora") == 1
        assert re.search(match, capsys.readouterr().err)


def test_bases_that_do_not_fit_say_what_to_do(tmp_path, capsys):
    module = "transformer.h.0.attn.c_proj"
    write(tmp_path / "a", {"r": 2, "target_modules": ["c_proj"]}, loras({module: (4, 4)}))
    base = gpt2(tmp_path / "base")
    tensors = {k.removeprefix("transformer."): x for k, x in tensors_of(base).items()}
    config = json.loads((base / "config.json").read_text())
    bare = folder_of(tmp_path / "bare", config, tensors)
    assert run(tmp_path / "a", tmp_path / "m", "--base", bare, "--merge") == 1
    assert "lack the prefix 'transformer.'" in capsys.readouterr().err
    for field, value in (
        ("tie_word_embeddings", "false"),
        ("vocab_size", float("nan")),
        ("architectures", "GPT2LMHeadModel"),
        ("text_config", []),
        ("model_type", 2),
    ):
        (base / "config.json").write_text(json.dumps(config | {field: value}))
        assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 1
        assert f"{field} must be " in capsys.readouterr().err
    (base / "config.json").unlink()
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 1
    assert "no config.json" in capsys.readouterr().err
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    (base / "config.json").write_text(json.dumps(config))
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 1
    assert "but pytorch_model.bin: a pickle" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_a_truncated_file_leaves_the_target_as_it_was(tmp_path, capsys):
    module = "transformer.h.0.attn.c_proj"
    write(tmp_path / "a", {"r": 2, "target_modules": ["c_proj"]}, loras({module: (4, 4)}))
    base = gpt2(tmp_path / "base")
    assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    for file in (tmp_path / "a" / "adapter_model.safetensors", base / "model.safetensors"):
        whole = file.read_bytes()
        for kept in (0, 4, 100, -1):
            file.write_bytes(whole[:kept])
            assert run(tmp_path / "a", tmp_path / "m", "--base", base, "--merge") == 1
            error = capsys.readouterr().err
            assert f"{file.parent} are damaged, truncated or missing" in error
            assert file.name in error
        file.write_bytes(whole)
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "m"]
