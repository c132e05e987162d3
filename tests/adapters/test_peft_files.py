"""Adapters written as PEFT's files and read again."""

import json

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters import fold_peft, load_peft, save_peft
from lowrank_optax.models import Decoder, DecoderConfig, decoder_config
from tests.adapters.peft_files import (
    DIM,
    HEADS,
    NAMES,
    WIDTH,
    Model,
    adapted,
    output,
    query_folder,
    random_tensors,
    read,
    snapshot,
    write,
)

pytest.importorskip("safetensors")

LORA = lro.adapters.LoRA(rank=2, alpha=5, initial="random")
PREFIX = "base_model.model."
METHODS = {
    "lora": (LORA, ".*"),
    "rslora": (lro.adapters.LoRA(rank=2, alpha=5, rank_stabilized=True), "query|head"),
    "dropout": (lro.adapters.LoRA(rank=2, alpha=5, dropout=0.25), "query"),
    "no_alpha": (lro.adapters.LoRA(rank=2), "mlp|out"),
    "dora": (lro.adapters.DoRA(rank=2, alpha=5), "query|out|mlp|picture"),
}


@pytest.mark.slow
@pytest.mark.combinations(1)
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("case", METHODS)
def test_a_round_trip_is_bit_equal_in_stacked_and_single_layers(tmp_path, case, stacked):
    model = adapted(stacked, *METHODS[case])
    save_peft(model, tmp_path / "a", names=NAMES)
    for again in (Model(stacked), Model(not stacked)):
        load_peft(again, tmp_path / "a", names=NAMES)
        save_peft(again, tmp_path / "b", names=NAMES)
        assert read(tmp_path / "a")[0] == read(tmp_path / "b")[0]
        first, second = read(tmp_path / "a")[1], read(tmp_path / "b")[1]
        assert first.keys() == second.keys()
        assert all((first[k] == second[k]).all() for k in first)
    same = load_peft(Model(stacked), tmp_path / "a", names=NAMES)
    same.eval(), model.eval()
    # The files hold the same bits; these are sums of several layers, normalized in between.
    assert_close(output(same), output(model), 800)


@pytest.mark.parametrize("stacked", [True, False])
def test_tensors_are_transposed_and_heads_flat(tmp_path, stacked):
    model = adapted(stacked, LORA, "query|out")
    save_peft(model, tmp_path / "a", names=NAMES)
    tensors = read(tmp_path / "a")[1]
    for layer in range(3):
        one = model.layers if stacked else model.layers[layer]
        at = layer if stacked else ...
        for name, module, d_in, d_out in (
            ("query", "q_proj", DIM, HEADS * WIDTH),
            ("out", "o_proj", HEADS * WIDTH, DIM),
        ):
            a, b = (
                tensors[f"{PREFIX}model.layers.{layer}.self_attn.{module}.lora_{x}.weight"]
                for x in "AB"
            )
            assert (a.shape, b.shape) == ((2, d_in), (d_out, 2))
            arrays = getattr(one, name).adapters["default"].arrays
            np.testing.assert_array_equal(np.asarray(arrays["A"][...])[at], a.T)
            np.testing.assert_array_equal(np.asarray(arrays["B"][...])[at], b.T)


@pytest.mark.slow
def test_a_merged_weight_is_the_base_and_scale_times_b_a(tmp_path):
    """Independent of the layouts: the kernel itself, in NumPy and float64."""
    model = adapted(False, LORA, "query|out|picture|table|mlp")
    save_peft(model, tmp_path / "a", names=NAMES)
    config, tensors = read(tmp_path / "a")
    before = {k: np.array(getattr(m, "kernel", None)[...]) for k, m in _kernels(model).items()}
    table = np.array(model.table.embedding[...])
    lro.adapters.merge(model)
    scale = config["lora_alpha"] / config["r"]

    def factors(module, a="lora_A.weight", b="lora_B.weight"):
        names = (f"{PREFIX}{module}.{x}" for x in (a, b))
        return (tensors[name].astype(np.float64) for name in names)

    forms = {
        "query": ("model.layers.1.self_attn.q_proj", "ri,or->io", (DIM, HEADS, WIDTH)),
        "out": ("model.layers.1.self_attn.o_proj", "ri,or->io", (HEADS, WIDTH, DIM)),
        "mlp": ("model.layers.1.mlp", "ri,or->io", (DIM, DIM)),
        "picture": ("vision.patches", "richw,orjk->hwco", None),
    }
    for name, (module, equation, shape) in forms.items():
        a, b = factors(module)
        if name == "picture":
            change = np.einsum("rchw,or->hwco", a, b[:, :, 0, 0])
        else:
            change = np.einsum(equation, a, b).reshape(shape)
        after = np.asarray(_kernels(model)[name].kernel[...])
        np.testing.assert_allclose(after - before[name], scale * change, rtol=1e-5, atol=1e-5)
    a, b = factors("model.embed_tokens", "lora_embedding_A", "lora_embedding_B")
    change = np.asarray(model.table.embedding[...]) - table
    np.testing.assert_allclose(change, scale * (b @ a).T, rtol=1e-5, atol=1e-5)


def _kernels(model):
    layer = model.layers[1]
    return {"query": layer.query, "out": layer.out, "mlp": layer.mlp, "picture": model.picture}


@pytest.mark.slow
def test_ranks_of_the_layers_are_written_exactly(tmp_path):
    ranks = {"query": (1, 3, 2)}
    model = adapted(True, LORA, "query|mlp", rank_pattern=ranks, alpha_pattern={"mlp": 7})
    save_peft(model, tmp_path / "a", names=NAMES)
    config, tensors = read(tmp_path / "a")
    shapes = [
        tensors[f"{PREFIX}model.layers.{i}.self_attn.q_proj.lora_A.weight"].shape for i in range(3)
    ]
    assert shapes == [(1, DIM), (3, DIM), (2, DIM)]
    assert config["r"] == 2
    assert sorted(config["rank_pattern"].items()) == [
        (r"model\.layers\.0\.self_attn\.q_proj", 1),
        (r"model\.layers\.1\.self_attn\.q_proj", 3),
    ]
    assert set(config["alpha_pattern"].values()) | {config["lora_alpha"]} == {5, 7}
    for stacked in (True, False):
        again = load_peft(Model(stacked), tmp_path / "a", names=NAMES)
        np.testing.assert_allclose(output(again), output(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stacked", [True, False])
def test_alphas_may_differ_within_a_stack(tmp_path, stacked):
    pattern = {r"layers\.0\.self_attn\.q_proj": 7, r"2\.self_attn\.q_proj": 0.1}
    folder = query_folder(tmp_path / "a", alpha_pattern=pattern)
    model = load_peft(Model(stacked), folder, names=NAMES)
    save_peft(model, tmp_path / "b", names=NAMES)
    config = read(tmp_path / "b")[0]
    alphas = config["alpha_pattern"] | {"general": config["lora_alpha"]}
    assert sorted(alphas.values()) == [0.1, 3, 7]
    merged = lro.adapters.merge(model)
    assert len(merged.rows) == (1 if stacked else 3)
    tensors = read(folder)[1]
    for layer, alpha in enumerate((7, 3, 0.1)):
        a, b = (
            tensors[f"{PREFIX}model.layers.{layer}.self_attn.q_proj.lora_{x}.weight"] for x in "AB"
        )
        kernel = lambda m: np.asarray(
            m.layers.query.kernel[...] if stacked else m.layers[layer].query.kernel[...]  # noqa: B023
        )[layer if stacked else ...]  # noqa: B023
        change = kernel(model) - kernel(Model(stacked))
        np.testing.assert_allclose(
            change.reshape(DIM, -1), alpha / 2 * (b @ a).T, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("stacked", [True, False])
def test_some_layers_of_a_stack_may_have_no_adapter(tmp_path, stacked):
    folder = query_folder(tmp_path / "a", layers_to_transform=[0, 2])
    config, tensors = read(folder)
    kept = {k: x for k, x in tensors.items() if ".layers.1." not in k}
    write(folder, config, kept)
    model = load_peft(Model(stacked), folder, names=NAMES)
    save_peft(model, tmp_path / "b", names=NAMES)
    again = read(tmp_path / "b")[1]
    assert again.keys() == kept.keys()
    assert all((again[k] == kept[k]).all() for k in kept)


@pytest.mark.parametrize("stacked", [True, False])
def test_trained_parameters_and_biases_come_along(tmp_path, stacked):
    model = adapted(stacked, LORA, "query")
    trained = ["head/kernel", "layers/.*norm/", "picture", "query/bias"]
    lro.adapters.also_train(model, trained)
    for _, x in nnx.iter_graph(model):
        if isinstance(x, lro.adapters.AlsoTrained):
            x.set_value(jnp.asarray(np.asarray(x[...]) + np.float32(0.5)))
    save_peft(model, tmp_path / "a", names=NAMES)
    config, tensors = read(tmp_path / "a")
    assert config["bias"] == "lora_only"
    assert config["modules_to_save"] == sorted(
        ["lm_head", "vision.patches", *(f"model.layers.{i}.norm" for i in range(3))]
    )
    assert tensors[f"{PREFIX}lm_head.weight"].shape == (7, DIM)
    assert tensors[f"{PREFIX}vision.patches.weight"].shape == (DIM, 2, 2, 3)
    assert tensors[f"{PREFIX}model.layers.2.norm.weight"].shape == (DIM,)
    for other in (stacked, not stacked):
        again = load_peft(Model(other), tmp_path / "a", names=NAMES)
        np.testing.assert_allclose(output(again), output(model), rtol=1e-5, atol=1e-5)
        save_peft(again, tmp_path / "b", names=NAMES)
        assert all((x == tensors[k]).all() for k, x in read(tmp_path / "b")[1].items())
        assert read(tmp_path / "b")[0] == config


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",  # shared factors, and a changed base
    ["LoTR", "PiSSA", *(pytest.param(x, marks=pytest.mark.full) for x in ("LaMDA", "AFLoRA"))],
)
def test_methods_that_peft_lacks_are_plain_loras_of_the_same_change(tmp_path, name):
    model = adapted(True, getattr(lro.adapters, name)(rank=2, alpha=5), "query|mlp")
    save_peft(model, tmp_path / "a", names=NAMES)
    config = read(tmp_path / "a")[0]
    assert config["lora_alpha"] == config["r"] == (4 if name == "PiSSA" else 2)
    assert config["init_lora_weights"] is True
    again = load_peft(Model(True), tmp_path / "a", names=NAMES)
    np.testing.assert_allclose(output(again), output(model), rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_ranks_of_converted_methods_are_exact(tmp_path):
    method = lro.adapters.PiSSA(rank=(1, 3, 2), alpha=5)
    model = adapted(True, method, "query")
    save_peft(model, tmp_path / "a", names=NAMES)
    config = read(tmp_path / "a")[0]
    assert sorted([config["r"], *config["rank_pattern"].values()]) == [2, 4, 6]
    again = load_peft(Model(True), tmp_path / "a", names=NAMES)
    np.testing.assert_allclose(output(again), output(model), rtol=1e-5, atol=2e-5)


def test_the_file_is_as_peft_writes_it(tmp_path):
    from safetensors import safe_open

    model = adapted(True, LORA, "query")
    save_peft(model, tmp_path / "a", names=NAMES, base_model="org/name", dtype=jnp.bfloat16)
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    content = json.loads(text)
    assert text == json.dumps(content, indent=2, sort_keys=True) + "\n"
    assert content["base_model_name_or_path"] == "org/name"
    assert (content["peft_type"], content["task_type"]) == ("LORA", "CAUSAL_LM")
    assert content["target_modules"] == ["q_proj"]
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(k).get_dtype() for k in file.keys()} == {"BF16"}  # noqa: SIM118
    loaded = load_peft(Model(True), tmp_path / "a", names=NAMES)
    arrays = loaded.layers.query.adapters["default"].arrays
    assert arrays["A"][...].dtype == jnp.float32
    exact = model.layers.query.adapters["default"].arrays["A"][...]
    rounded = np.asarray(exact).astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(arrays["A"][...], rounded)


@pytest.mark.slow
def test_the_decoder_knows_its_names(tmp_path):
    config = decoder_config(
        "llama-tiny", vocab_size=17, hidden_size=16, num_hidden_layers=2, intermediate_size=24
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    lro.adapters.attach(model, LORA, ".*", rngs=0)
    save_peft(model, tmp_path / "a")
    tensors = read(tmp_path / "a")[1]
    layers, outer = 2 * 7, 1 + (model.lm_head is not None)  # outer ones bring their bases along
    assert len(tensors) == 2 * layers + 3 * outer
    name = f"{PREFIX}model.layers.1.mlp.down_proj.lora_A.weight"
    down = model.blocks.mlp.down.adapters["default"].arrays["A"]
    np.testing.assert_array_equal(np.asarray(down[...])[1], tensors[name].T)
    again = load_peft(Decoder(config, rngs=nnx.Rngs(0)), tmp_path / "a")
    saved, loaded = (nnx.state(m, lro.adapters.trainable) for m in (model, again))
    jax.tree.map(np.testing.assert_array_equal, loaded, saved)
    assert again.blocks.mlp.down.adapters["default"].method.scale_of(2) == 5 / 2


def test_names_may_be_a_function(tmp_path):
    save_peft(
        adapted(False, LORA, "mlp"), tmp_path / "a", names=lambda path: path.replace("/", ".")
    )
    assert f"{PREFIX}layers.0.mlp.lora_A.weight" in read(tmp_path / "a")[1]


def test_two_adapters_of_one_model_are_two_folders(tmp_path):
    model = adapted(True, LORA, "query")
    lro.adapters.attach(model, LORA, "mlp", rngs=8, name="other")
    save_peft(model, tmp_path / "a", names=NAMES)
    save_peft(model, tmp_path / "b", names=NAMES, name="other")
    again = load_peft(Model(True), tmp_path / "a", names=NAMES)
    load_peft(again, tmp_path / "b", names=NAMES, name="second")
    np.testing.assert_allclose(output(again), output(model), rtol=1e-5, atol=1e-5)


def test_names_with_the_adapters_name_in_them_load(tmp_path):
    folder = query_folder(tmp_path / "a")
    config, tensors = read(folder)
    write(
        tmp_path / "b",
        config,
        {k.replace(".weight", ".default.weight"): x for k, x in tensors.items()},
    )
    one, two = (load_peft(Model(True), tmp_path / x, names=NAMES) for x in "ab")
    assert_close(output(one), output(two), 800)


def test_an_embedding_brings_its_base_along(tmp_path):
    module = f"{PREFIX}model.embed_tokens"
    shapes = {
        f"{module}.lora_embedding_A": (2, 7),
        f"{module}.lora_embedding_B": (DIM, 2),
        f"{module}.base_layer.weight": (7, DIM),
    }
    tensors = random_tensors(shapes)
    folder = write(tmp_path / "a", {"r": 2, "target_modules": ["embed_tokens"]}, tensors)
    model = load_peft(Model(True), folder, names=NAMES)
    np.testing.assert_array_equal(
        model.table.embedding[...], tensors[f"{module}.base_layer.weight"]
    )
    assert not isinstance(model.table.embedding, lro.adapters.AlsoTrained)


@pytest.mark.slow
def test_each_adapter_has_values_of_its_own_and_the_bases_return(tmp_path):
    model, base = Model(True), output(Model(True))
    graphdef = nnx.graphdef(model)
    expected = {}
    for name, change in (("a", 0.5), ("b", -0.25)):
        lro.adapters.attach(model, LORA, "query", rngs=0, name=name)
        lro.adapters.activate(model, name)
        assert lro.adapters.also_train(model, "head|norm/scale", name=name) == [
            "head/kernel",
            "layers/norm/scale",
        ]
        for x in (model.head.kernel, model.layers.norm.scale):
            x.set_value(x[...] + np.float32(change))
        expected[name] = output(model)
    with lro.adapters.disabled(model):
        np.testing.assert_array_equal(output(model), base)
        assert type(model.head.kernel) is nnx.Param
    np.testing.assert_array_equal(output(model), expected["b"])
    lro.adapters.activate(model, "a")
    np.testing.assert_array_equal(output(model), expected["a"])
    with pytest.raises(ValueError, match="own values in each of the adapters 'a', 'b'"):
        lro.adapters.activate(model)
    for name in "ab":  # whichever is active
        save_peft(model, tmp_path / name, names=NAMES, name=name)
    np.testing.assert_array_equal(output(model), expected["a"])
    kernels = {n: read(tmp_path / n)[1][f"{PREFIX}lm_head.weight"] for n in "ab"}
    assert_close(kernels["a"] - kernels["b"], np.full((7, DIM), 0.75), 4)
    lro.adapters.detach(model, "a")
    np.testing.assert_array_equal(output(model), base)
    lro.adapters.activate(model, "b")
    np.testing.assert_array_equal(output(model), expected["b"])
    lro.adapters.detach(model)
    np.testing.assert_array_equal(output(model), base)
    assert nnx.graphdef(model) == graphdef

    load_peft(model, tmp_path / "a", names=NAMES, name="a")
    with pytest.warns(UserWarning, match="'b' has values of its own, and so has 'a', which is de"):
        load_peft(model, tmp_path / "b", names=NAMES, name="b")
    for name in "ba":
        lro.adapters.activate(model, name)
        assert_close(output(model), expected[name], 800)


def test_trained_values_of_a_merged_adapter_stay(tmp_path):
    model = adapted(True, LORA, "query")
    lro.adapters.also_train(model, "head")
    model.head.kernel.set_value(model.head.kernel[...] + 1)
    expected = output(model)
    lro.adapters.merge(model)
    lro.adapters.detach(model)
    assert_close(output(model), expected, 800)
    assert type(model.head.kernel) is nnx.Param


def test_values_and_adapters_that_are_merged_into_them_are_not_taken_apart():
    model = adapted(True, LORA, "mlp")
    lro.adapters.attach(model, LORA, "mlp", rngs=0, name="b")
    lro.adapters.also_train(model, "mlp", name="b")
    lro.adapters.merge(model, "default")
    with pytest.raises(ValueError, match="'default' is merged into the values of 'b'"):
        lro.adapters.detach(model)
    lro.adapters.unmerge(model)
    lro.adapters.detach(model, "b")
    lro.adapters.merge(model)
    lro.adapters.attach(model, LORA, "mlp", rngs=0, name="c")
    with pytest.raises(ValueError, match="layers/mlp/kernel: the adapter 'default' is merged"):
        lro.adapters.also_train(model, "mlp/kernel", name="c")


def test_whose_parameters_are_trained_must_be_said_of_several_adapters():
    model = adapted(True, LORA, "query")
    lro.adapters.attach(model, LORA, "mlp", rngs=0, name="other")
    with pytest.raises(ValueError, match=r"name=None: .* 'other', 'default'; give"):
        lro.adapters.also_train(model, "head")
    lro.adapters.also_train(model, "head", name="other")
    with pytest.raises(ValueError, match="head/kernel has values of the adapter 'other' in it"):
        lro.adapters.also_train(model, "head", name="default")
    lro.adapters.deactivate(model, "other")
    with pytest.raises(ValueError, match="adapter 'other' is inactive"):
        lro.adapters.also_train(model, "head", name="other")
    row = next(r for r in lro.adapters.summary(model).rows if r.method == "also trained")
    assert (row.adapter, row.trained, row.frozen, row.state) == ("other", 0, 7 * DIM, "inactive")


def test_an_embeddings_base_is_written_and_returns_when_the_adapter_is_detached(tmp_path):
    model = adapted(True, LORA, "table")
    save_peft(model, tmp_path / "a", names=NAMES, dtype=jnp.bfloat16)
    tensors = read(tmp_path / "a")[1]
    table = tensors[f"{PREFIX}model.embed_tokens.base_layer.weight"]
    np.testing.assert_array_equal(table, model.table.embedding[...])  # not rounded
    again = load_peft(Model(True), tmp_path / "a", names=NAMES)
    assert not hasattr(again.table, "own_values")  # it is the model's own
    config, tensors = read(tmp_path / "a")
    tensors[f"{PREFIX}model.embed_tokens.base_layer.weight"] = table + 1
    write(tmp_path / "b", config, tensors)
    again = load_peft(Model(True), tmp_path / "b", names=NAMES)
    np.testing.assert_array_equal(again.table.embedding[...], table + 1)
    save_peft(again, tmp_path / "c", names=NAMES)
    saved = read(tmp_path / "c")[1][f"{PREFIX}model.embed_tokens.base_layer.weight"]
    np.testing.assert_array_equal(saved, table + 1)
    lro.adapters.detach(again)
    np.testing.assert_array_equal(again.table.embedding[...], table)


def test_an_embedding_that_may_be_the_head_is_warned_of_and_a_tied_one_refused(tmp_path):
    model = adapted(True, LORA, "query")
    lro.adapters.also_train(model, "table")
    save_peft(model, tmp_path / "a", names=NAMES)
    load_peft(Model(True), tmp_path / "a", names=NAMES)  # it has a head of its own
    names = {k: v for k, v in NAMES.items() if k != "head"}
    for read_into in (load_peft, fold_peft):
        match = r"model\.embed_tokens\. If its table is the head's too"
        with pytest.warns(UserWarning, match=match):
            read_into(Model(True), tmp_path / "a", names=names)
    tied = Model(True)
    tied.config = DecoderConfig(8, 8, 8, 1, 1, tie_word_embeddings=True)
    with pytest.raises(lro.adapters.UnsupportedConfigError, match=r"embed_tokens alone: PEFT gave"):
        load_peft(tied, tmp_path / "a", names=names)


def test_a_square_weight_of_gpt2_cannot_be_told_from_its_transpose(tmp_path):
    model = adapted(True, LORA, "query")
    lro.adapters.also_train(model, "mlp")
    save_peft(model, tmp_path / "a", names=NAMES)
    config, tensors = read(tmp_path / "a")
    write(tmp_path / "a", config | {"fan_in_fan_out": True}, tensors)
    with pytest.raises(
        lro.adapters.UnsupportedConfigError, match=r"mlp in modules_to_save, a squa"
    ):
        load_peft(Model(True), tmp_path / "a", names=NAMES)


class Small(nnx.Module):
    """A layer and a head, whose weight PEFT writes beside an adapter."""

    def __init__(self, seed=0):
        self.mlp = nnx.Linear(DIM, 6, rngs=nnx.Rngs(seed))
        self.head = nnx.Linear(6, 5, rngs=nnx.Rngs(seed + 1))

    def __call__(self, x):
        return self.head(jnp.tanh(self.mlp(x)))


SMALL = {"mlp": "mlp", "head": "lm_head"}
INPUTS = np.linspace(-1, 1, 3 * DIM, dtype=np.float32).reshape(3, DIM)


def move(model, name):
    """Factors of an adapter as if they had been trained."""
    rng = np.random.default_rng(len(name))
    for layer in (model.mlp, model.head):
        if name in getattr(layer, "adapters", {}):
            arrays = layer.adapters[name].arrays
            for key in sorted({"A", "B", "magnitude"} & set(arrays)):
                noise = rng.normal(size=arrays[key].shape).astype(np.float32)
                arrays[key].set_value(arrays[key][...] + 0.3 * noise)


def put(model, method, where, name="a"):
    lro.adapters.attach(model, method, where, rngs=0, name=name)
    move(model, name)
    return model


def saved_and_loaded(model, folder, name="a", seed=0):
    save_peft(model, folder, name=name, names=SMALL)
    return load_peft(Small(seed), folder, name=name, names=SMALL)


BASES = {
    "lora": LORA,
    "dora": lro.adapters.DoRA(rank=2, alpha=5),
    "pissa": lro.adapters.PiSSA(rank=2, alpha=5),
}


@pytest.mark.parametrize("case", ["plain", "merged", "layer_merged", "other_merged", "own_head"])
@pytest.mark.parametrize("method", BASES)
def test_a_saved_adapter_gives_its_outputs_on_a_fresh_base_or_is_refused(tmp_path, method, case):
    model = put(Small(), BASES[method], "mlp" if case in ("own_head", "layer_merged") else ".*")
    if case == "own_head":
        lro.adapters.also_train(model, "head/kernel")
        model.head.kernel.set_value(2 * model.head.kernel[...])
    expected = model(INPUTS)
    merged = "b" if case == "other_merged" else "a"
    if case == "other_merged":
        lro.adapters.deactivate(put(model, LORA, "head", "b"), "a")
    if case.endswith("merged"):
        lro.adapters.merge(model, merged)
    if case in ("merged", "other_merged") and method != "pissa":  # whose file holds no base
        with pytest.raises(
            ValueError, match=f"head: its weight is saved.*unmerge '{merged}' first"
        ):
            save_peft(model, tmp_path / "a", name="a", names=SMALL)
        assert not list(tmp_path.iterdir())
        lro.adapters.unmerge(model)
    assert_close(saved_and_loaded(model, tmp_path / "a")(INPUTS), expected, 400)


def test_a_head_that_has_a_change_in_it_is_not_saved(tmp_path):
    # The change of another adapter, merged into the values of the one that is saved.
    model = put(Small(), LORA, "mlp")
    lro.adapters.also_train(model, "head/bias")
    lro.adapters.also_train(model, "head/kernel")
    put(model, LORA, "head", "b")
    expected = lambda: saved_and_loaded(model, tmp_path / "a")(INPUTS)
    before = expected()
    lro.adapters.merge(model, "b")
    with pytest.raises(ValueError, match=r"head: its weight is saved.*unmerge 'b' first"):
        expected()
    lro.adapters.unmerge(model)
    assert_close(expected(), before, 100)
    # A residual that another adapter's method left.
    model = put(put(Small(), BASES["pissa"], "head", "p"), LORA, "head")
    with pytest.raises(ValueError, match=r"head: .*'p' \(PiSSA\) .*residual: detach 'p' first"):
        save_peft(model, tmp_path / "b", name="a", names=SMALL)
    lro.adapters.activate(model, "a")
    expected = model(INPUTS)
    lro.adapters.detach(model, "p")
    assert_close(saved_and_loaded(model, tmp_path / "b")(INPUTS), expected, 400)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_beside_another_head_is_that_of_the_file(tmp_path, method):
    """The function that is saved has a head of its own, from which DoRA's norms are computed."""
    source = Small()
    source.head.kernel.set_value(1 - 2 * source.head.kernel[...])
    put(source, BASES[method], "head")
    save_peft(source, tmp_path / "a", names=SMALL, name="a")
    model = load_peft(Small(), tmp_path / "a", name="a", names=SMALL)
    model.head.bias.set_value(source.head.bias[...])
    model.mlp = source.mlp
    assert_close(model(INPUTS), source(INPUTS), 200)
    model = load_peft(Small(), tmp_path / "a", name="a", names=SMALL)
    lro.adapters.deactivate(model)
    assert_close(model(INPUTS), Small()(INPUTS))
    lro.adapters.detach(model)
    assert_close(model(INPUTS), Small()(INPUTS))


def test_one_folder_under_two_names_is_one_function(tmp_path):
    source = put(Small(5), LORA, "head")
    save_peft(source, tmp_path / "a", names=SMALL, name="a")
    model = load_peft(Small(), tmp_path / "a", names=SMALL, name="a")
    expected = model(INPUTS)
    with pytest.warns(UserWarning, match="'b' has values of its own, and so has 'a'"):
        load_peft(model, tmp_path / "a", names=SMALL, name="b")
    for name in "bab":
        lro.adapters.activate(model, name)
        assert_close(model(INPUTS), expected)
    # Beside values of another adapter, the model's own base is no other base.
    save_peft(put(Small(), LORA, "head", "c"), tmp_path / "c", names=SMALL, name="c")
    load_peft(model, tmp_path / "c", names=SMALL, name="c")
    lro.adapters.activate(model, "c")
    assert_close(model(INPUTS), put(Small(), LORA, "head", "c")(INPUTS))


def test_values_in_a_model_with_a_merged_adapter_are_not_replaced(tmp_path):
    source = put(Small(), LORA, "mlp")
    lro.adapters.also_train(source, "head/kernel")
    save_peft(source, tmp_path / "a", name="a", names=SMALL)
    model = put(Small(), LORA, "mlp", "b")
    lro.adapters.also_train(model, "head/kernel")
    put(model, LORA, "mlp", "c")
    lro.adapters.merge(model, "c")
    before = snapshot(model)
    with pytest.raises(ValueError, match="'c' of mlp is merged into the weight: unmerge"):
        load_peft(model, tmp_path / "a", name="a", names=SMALL)
    assert snapshot(model) == before


def test_values_that_were_trained_before_there_was_an_adapter_are_replaced(tmp_path):
    source = put(Small(), LORA, "mlp", "default")
    lro.adapters.also_train(source, "head/kernel")
    source.head.kernel.set_value(2 * source.head.kernel[...])
    save_peft(source, tmp_path / "a", names=SMALL)
    model = Small()
    lro.adapters.also_train(model, "head/kernel")
    load_peft(model, tmp_path / "a", names=SMALL)
    assert_close(model(INPUTS), source(INPUTS), 100)
    lro.adapters.detach(model)
    assert_close(model(INPUTS), Small()(INPUTS))


def test_a_head_with_a_call_of_its_own_is_written_where_it_says_that_its_weight_is_plain(tmp_path):
    class Head(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class PlainHead(Head):
        plain_weights = True
        __call__ = Head.__call__

    def model(kind, trained):
        small = Small()
        small.head = kind(6, 5, rngs=nnx.Rngs(1))
        put(small, LORA, "mlp" if trained else "head", "default")
        if trained:
            lro.adapters.also_train(small, "head/kernel")
        return small

    for trained in (False, True):
        match = "^head: save_peft writes the layer's weight, .* of Head .*`plain_weights = True`"
        with pytest.raises(TypeError, match=match):
            save_peft(model(Head, trained), tmp_path / "a", names=SMALL)
        assert not (tmp_path / "a").exists()
        save_peft(model(PlainHead, trained), tmp_path / str(trained), names=SMALL)


@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_a_weight_with_values_of_adapters_has_no_adapter_computed_from_it(tmp_path, method):
    model = put(Small(), LORA, "mlp")
    lro.adapters.also_train(model, "head/kernel")
    before = snapshot(model)
    refused = r"head has values of its own in the adapter 'a'.*leave head out"
    with pytest.raises(ValueError, match=refused):
        put(model, BASES[method], ".*", "b")
    lro.adapters.deactivate(model)
    with pytest.raises(ValueError, match=refused):
        put(model, BASES[method], "head", "b")
    lro.adapters.activate(model)
    assert snapshot(model) == before
    save_peft(model, tmp_path / "a", names=SMALL, name="a")
    other = put(Small(), BASES[method], "head", "b")
    put(other, LORA, "mlp", "c")
    before = snapshot(other)
    refused = r"head/kernel: the adapter 'b' \(.*\) was computed from its values.*detach 'b' first"
    for name in "bc":
        with pytest.raises(ValueError, match=refused):
            lro.adapters.also_train(other, "head", name=name)
    lro.adapters.deactivate(other, "b")
    with pytest.raises(ValueError, match=refused):
        load_peft(other, tmp_path / "a", names=SMALL, name="a")
    lro.adapters.activate(other)
    assert snapshot(other) == before
    lro.adapters.also_train(other, "head/bias", name="c")
