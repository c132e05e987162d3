"""PEFT's files of MiSS, of Bone and of RandLoRA, which are attached here and written again."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters import UnsupportedConfigError, fold_peft, load_peft, save_peft
from tests.adapters.peft_files import (
    NAMES,
    SIZES,
    Model,
    adapted,
    output,
    random_tensors,
    read,
    snapshot,
    write,
)

pytest.importorskip("safetensors")

MiSS, MiSSBat, RandLoRA = lro.adapters.MiSS, lro.adapters.MiSSBat, lro.adapters.RandLoRA
BASES = {"base_model.randlora_A": (3, 1, 6), "base_model.randlora_B": (6, 2, 3)}
# Fields, shapes of the tensors of a layer, and the method.
CASES = {
    "MISS": ({"r": 3, "miss_dropout": 0.25}, lambda i, o: {"miss_block": (3, o)},
             MiSS(rank=3, dropout=0.25)),
    "MISS mini": ({"r": 4, "mini_r": 2, "init_weights": "mini"},
                  lambda i, o: {"miss_block": (4, 2)}, MiSS(rank=4, mini_rank=2)),
    "MISS bat": ({"r": 2, "init_weights": "bat"}, lambda i, o: {"miss_block": (o // 2, 2, 2)},
                 MiSSBat(rank=2)),
    "BONE": ({"r": 3, "init_weights": False}, lambda i, o: {"bone_block": (3, o)}, MiSS(rank=3)),
    "BONE bat": ({"r": 2, "init_weights": "bat"}, lambda i, o: {"bone_block": (o // 2, 2, 2)},
                 MiSSBat(rank=2)),
    "RANDLORA": ({"r": 3, "randlora_alpha": 7, "randlora_dropout": 0.25, "sparse": True},
                 lambda i, o: {"randlora_lambda": (3, 2), "randlora_gamma": (2, 4)},
                 RandLoRA(rank=3, alpha=7, dropout=0.25, bases="sparse")),
    "RANDLORA both": ({"r": 3, "randlora_alpha": 7, "sparse": True, "very_sparse": True},
                      lambda i, o: {"randlora_lambda": (3, 2), "randlora_gamma": (2, 4)},
                      RandLoRA(rank=3, alpha=7, bases="very_sparse")),
}  # fmt: skip


def folder_of(path, case, layers=(0, 1, 2), **changes):
    """A folder for layers of three shapes, as PEFT writes it."""
    fields, shapes, _ = CASES[case]
    tensors = {
        f"base_model.model.model.layers.{layer}.{module}.{name}": shape
        for layer in layers
        for module, sizes in SIZES.items()
        for name, shape in shapes(*sizes).items()
    }
    tensors |= BASES if case.startswith("RANDLORA") else {}
    values = random_tensors(tensors)
    values = {k: 0.1 * x if k.endswith("randlora_lambda") else x for k, x in values.items()}
    if case == "RANDLORA":  # PEFT repeats them for every layer
        module = "base_model.model.model.layers.1.mlp"
        values |= {f"{module}.randlora_{x}": values[f"base_model.randlora_{x}"] for x in "AB"}
    targets = {"peft_type": case.split()[0], "target_modules": ["q_proj", "o_proj", "mlp"]}
    return write(path, targets | fields | changes, values)


def agree(ours, expected):
    """Outputs relative to the largest of them."""
    size = np.abs(expected).max()
    np.testing.assert_allclose(ours / size, expected / size, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.combinations(1)
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_file_is_attached_and_written_again_bit_for_bit(tmp_path, case, stacked):
    path, method = folder_of(tmp_path / "a", case), CASES[case][2]
    model = load_peft(Model(stacked), path, names=NAMES)
    layer = model.layers if stacked else model.layers[0]
    assert layer.query.adapters["default"].method == method
    model.eval()
    expected = output(fold_peft(Model(stacked), path, names=NAMES))
    assert np.abs(expected - output(Model(stacked))).max() > 0.1
    agree(output(model), expected)
    save_peft(model, tmp_path / "b", names=NAMES, as_lora=False)
    (was, before), (now, after) = read(path), read(tmp_path / "b")
    new = {name.replace("bone_block", "miss_block"): x for name, x in before.items()}
    new = {name: x for name, x in new.items() if "mlp.randlora_A" not in name}
    new = {name: x for name, x in new.items() if "mlp.randlora_B" not in name}
    assert after.keys() == new.keys()
    assert all((after[k] == x).all() for k, x in new.items())
    # Bases of both kinds are of the second one, and a random start has no part in the method.
    changed = {"peft_type": was["peft_type"].replace("BONE", "MISS")}
    changed |= {"init_weights": True} if was.get("init_weights") is False else {}
    changed |= {"sparse": False} if was.get("very_sparse") else {}
    assert now.items() >= (was | changed | {"target_modules": now["target_modules"]}).items()
    assert set(now["target_modules"]) == set(was["target_modules"])
    if case.startswith("RANDLORA"):
        assert now["save_projection"] is True
    agree(output(fold_peft(Model(stacked), tmp_path / "b", names=NAMES)), expected)


@pytest.mark.parametrize("case", ["MISS", "MISS bat", "RANDLORA both"])
def test_layers_of_a_stack_cannot_be_left_out(tmp_path, case):
    path = folder_of(tmp_path / "a", case, layers=(0, 2), layers_to_transform=[0, 2])
    model = Model(True)
    before = snapshot(model)
    kind = type(CASES[case][2]).__name__
    with pytest.raises(UnsupportedConfigError, match=f"^{kind} of 2 of the 3 layers .* not stacke"):
        load_peft(model, path, names=NAMES)
    assert snapshot(model) == before
    model = load_peft(Model(False), path, names=NAMES)
    model.eval()
    agree(output(model), output(fold_peft(Model(True), path, names=NAMES)))
    save_peft(model, tmp_path / "b", names=NAMES)
    assert read(tmp_path / "b")[1].keys() <= read(path)[1].keys()


@pytest.mark.parametrize(
    ("case", "changes", "match"),
    [
        ("MISS", {"r": 5}, r"r=5 of model\.layers\.0\.\S+ must be at most its 4 inputs"),
        ("MISS", {"miss_dropout": 1}, "miss_dropout must be a number of at least 0 and below 1"),
        ("MISS", {"init_weights": "bat"}, "r=3 of .* with init_weights='bat' must divide its 4"),
        ("MISS mini", {"mini_r": 4}, r"mini_r=4 of \S+q_proj must divide its 6 outputs"),
        ("MISS mini", {"init_weights": True}, r"\(4, 2\), not \(4, 6\)"),
        ("BONE bat", {"r": 4}, "r=4 of .*o_proj with .* must divide its 6 inputs and 4 outputs"),
        ("RANDLORA", {"save_projection": False}, "save_projection=False"),
        ("RANDLORA", {"randlora_dropout": -1}, "randlora_dropout must be a number of at least 0"),
        ("RANDLORA", {"sparse": "yes"}, "sparse must be true or false, got 'yes'"),
        ("RANDLORA", {"r": 2}, r"base_model\.randlora_A \(3, 1, 6\), not \(2, 1, 6\)"),
    ],
)
def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path, case, changes, match):
    path, model = folder_of(tmp_path / "a", case, **changes), Model(True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        load_peft(model, path, names=NAMES)
    assert snapshot(model) == before


@pytest.mark.parametrize("stacked", [True, False])
def test_what_depends_on_the_weight_is_not_loaded_beside_what_has_changed_it(tmp_path, stacked):
    path = folder_of(tmp_path / "a", "BONE bat")
    model = adapted(stacked, lro.adapters.LoRA(rank=1), "out", name="other")
    lro.adapters.merge(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'other' is merged into its weight, and MiSSBat depends"):
        load_peft(model, path, names=NAMES)
    assert snapshot(model) == before


def test_what_is_loaded_is_trained_further(tmp_path):
    for case, names in (
        ("MISS mini", {"mini"}),
        ("BONE bat", {"D"}),
        ("RANDLORA", {"lambda", "gamma"}),
    ):
        model = load_peft(Model(True), folder_of(tmp_path / case, case), names=NAMES)
        trained = nnx.to_flat_state(nnx.state(model, lro.adapters.trainable))
        assert {name[-1] for name, _ in trained} == names
        assert all(x[...].dtype == jnp.float32 for _, x in trained)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.combinations(1)
@pytest.mark.parametrize(
    ("method", "bias"),
    [
        (MiSS(rank=4), "MiSS_only"),
        (MiSS(rank=3, mini_rank=2), "MiSS_only"),
        (MiSSBat(rank=2), "MiSS_only"),
        (RandLoRA(rank=3), "randlora_only"),
        (RandLoRA(rank=5, alpha=2, param_dtype=jnp.bfloat16), "randlora_only"),
    ],
    ids=str,
)
@pytest.mark.full
def test_what_is_attached_here_is_written_with_biases_and_read(tmp_path, method, bias, stacked):
    model = adapted(True, method, "query|out|mlp")
    lro.adapters.also_train(model, "query/bias")
    model.layers.query.bias.set_value(model.layers.query.bias[...] + 1)
    expected = output(model)
    save_peft(model, tmp_path / "a", names=NAMES)
    config, tensors = read(tmp_path / "a")
    assert (config["r"], config["bias"]) == (method.rank, bias)
    assert all(x.dtype == np.float32 for x in tensors.values())
    for again in (load_peft, fold_peft):
        agree(output(again(Model(stacked), tmp_path / "a", names=NAMES)), expected)


def test_bases_are_filled_with_zeros_to_the_sizes_of_peft(tmp_path):
    # The most inputs and the most outputs are 6, but 4 is the smaller side of all layers.
    model = adapted(True, RandLoRA(rank=3), "query|out")
    (bases,) = model.adapter_groups["default"].values()
    assert (bases["A"].shape, bases["B"].shape) == ((3, 1, 4), (6, 2, 3))
    save_peft(model, tmp_path / "a", names=NAMES)
    config, tensors = read(tmp_path / "a")
    assert config["randlora_alpha"] == 60
    a = tensors["base_model.randlora_A"]
    assert a.shape == (3, 1, 6)
    assert (a[..., :4] == bases["A"][...]).all()
    assert not a[..., 4:].any()
    assert (tensors["base_model.randlora_B"] == bases["B"][...]).all()
    # Of rank 4 there is one basis for 4 and there are two for 6.
    save_peft(adapted(True, RandLoRA(rank=4), "query|out"), tmp_path / "b", names=NAMES)
    b = read(tmp_path / "b")[1]["base_model.randlora_B"]
    assert b.shape == (6, 2, 4)
    assert b[:, 0].all()
    assert not b[:, 1].any()


@pytest.mark.parametrize(
    ("where", "options"),
    [("query|mlp", {"rank_pattern": {"query": 2}}), ("query|table", {}), ("query|picture", {})],
)
def test_miss_that_peft_has_not_is_written_as_a_plain_lora(tmp_path, where, options):
    model = adapted(True, MiSS(rank=3), where, **options)
    with pytest.raises(ValueError, match=r"^as_lora=False: PEFT has MiSS of linear .*; leave it o"):
        save_peft(model, tmp_path / "a", names=NAMES, as_lora=False)
    assert not (tmp_path / "a").exists()
    save_peft(model, tmp_path / "a", names=NAMES)
    assert read(tmp_path / "a")[0]["peft_type"] == "LORA"
    agree(output(load_peft(Model(True), tmp_path / "a", names=NAMES)), output(model))


def test_miss_is_a_plain_lora_if_that_is_asked_for(tmp_path):
    model = adapted(True, MiSS(rank=3), "query|mlp")
    save_peft(model, tmp_path / "a", names=NAMES, as_lora=True)
    config = read(tmp_path / "a")[0]
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 3)
    agree(output(load_peft(Model(True), tmp_path / "a", names=NAMES)), output(model))


@pytest.mark.parametrize("as_lora", [None, False])
@pytest.mark.parametrize(
    ("method", "where", "options"),
    [
        (MiSSBat(rank=2, side="in"), "query", {}),
        (MiSSBat(rank=2), "query|mlp", {"rank_pattern": {"mlp": 1}}),
        (MiSSBat(rank=1), "mlp|table", {}),
        (RandLoRA(rank=2), "query|mlp", {"rank_pattern": {"mlp": 1}}),
        (RandLoRA(rank=2), "query|mlp", {"alpha_pattern": {"mlp": 1}}),
        (RandLoRA(rank=2), "query|picture", {}),
    ],
    ids=str,
)
def test_what_peft_has_not_and_is_no_lora_is_refused(tmp_path, method, where, options, as_lora):
    model = adapted(True, method, where, **options)
    with pytest.raises(ValueError, match=r"^\S+: PEFT has \w+ of linear layers only.* be saved"):
        save_peft(model, tmp_path / "a", names=NAMES, as_lora=as_lora)
    assert not (tmp_path / "a").exists()


def test_methods_of_full_rank_are_no_loras(tmp_path):
    for method in (MiSSBat(rank=2), RandLoRA(rank=2)):
        with pytest.raises(TypeError, match="makes no change of low rank"):
            save_peft(adapted(True, method, "mlp"), tmp_path / "a", names=NAMES, as_lora=True)
    assert not (tmp_path / "a").exists()


def test_one_file_holds_miss_or_its_block_affine_form(tmp_path):
    model = adapted(True, MiSS(rank=2), "mlp")
    lro.adapters.attach(model, MiSSBat(rank=2), "query", rngs=0)
    with pytest.raises(ValueError, match=r"query: PEFT has MiSS of linear layers only"):
        save_peft(model, tmp_path / "a", names=NAMES)
    assert not (tmp_path / "a").exists()
