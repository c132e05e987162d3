"""PEFT's VeRA files, which have one pair of projections, and adapters with one for each shape."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters import fold_peft, load_peft, save_peft
from tests.adapters.peft_files import (
    NAMES,
    SIZES,
    Model,
    Q,
    adapted,
    output,
    random_tensors,
    read,
    snapshot,
    write,
)

pytest.importorskip("safetensors")


def vera_folder(path, layers=(0, 1, 2), **changes):
    """VeRA of rank 5 on layers of three shapes, as PEFT writes it."""
    shapes = {"base_model.vera_A": (5, 6), "base_model.vera_B": (6, 5)}
    for layer in layers:
        for module, (_, d_out) in SIZES.items():
            name = f"base_model.model.model.layers.{layer}.{module}.vera_lambda"
            shapes |= {f"{name}_d": (5,), f"{name}_b": (d_out,)}
    config = {"peft_type": "VERA", "r": 5, "target_modules": ["q_proj", "o_proj", "mlp"]}
    return write(path, config | changes, random_tensors(shapes))


def agree(ours, expected):
    """Outputs are up to 10, after layers that amplify rounding."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_file_is_attached_and_written_again_bit_for_bit(tmp_path, stacked):
    path = vera_folder(tmp_path / "a", vera_dropout=0.25)
    model = load_peft(Model(stacked), path, names=NAMES)
    layer = model.layers if stacked else model.layers[0]
    method = layer.query.adapters["default"].method
    assert method == lro.adapters.VeRA(rank=5, dropout=0.25)
    model.eval()
    expected = output(fold_peft(Model(stacked), path, names=NAMES))
    assert np.abs(expected - output(Model(stacked))).max() > 0.1
    agree(output(model), expected)
    save_peft(model, tmp_path / "b", names=NAMES, task_type=None)
    (config, tensors), (_, before) = read(tmp_path / "b"), read(path)
    assert (config["peft_type"], config["r"], config["vera_dropout"]) == ("VERA", 5, 0.25)
    assert config["save_projection"] is True
    assert tensors.keys() == before.keys()
    assert all((tensors[k] == x).all() for k, x in before.items())


def test_layers_of_a_stack_that_a_file_leaves_out_do_not_change(tmp_path):
    path = vera_folder(tmp_path / "a", layers=(0, 2), layers_to_transform=[0, 2])
    model = load_peft(Model(True), path, names=NAMES)
    expected = output(fold_peft(Model(False), path, names=NAMES))
    agree(output(model), expected)
    save_peft(model, tmp_path / "b", names=NAMES)
    assert read(tmp_path / "b")[1].keys() == read(path)[1].keys()


def test_layers_of_one_shape_are_written_as_vera(tmp_path):
    model = adapted(True, lro.adapters.VeRA(rank=(3, 1, 2)), "query")
    lro.adapters.also_train(model, "query/bias")
    bias = model.layers.query.bias
    bias.set_value(bias[...] + 1)
    save_peft(model, tmp_path / "a", names=NAMES)
    config, tensors = read(tmp_path / "a")
    assert (config["peft_type"], config["r"], config["bias"]) == ("VERA", 3, "vera_only")
    d = tensors[f"base_model.model.model.layers.1.{Q}.vera_lambda_d"]
    assert (d != 0).tolist() == [True, False, False]  # directions beyond its own rank
    for again in (load_peft, fold_peft):
        loaded = again(Model(True), tmp_path / "a", names=NAMES)
        agree(output(loaded), output(model))


@pytest.mark.parametrize(
    "where", [pytest.param("query|mlp", marks=pytest.mark.full), "query|table"]
)
def test_layers_with_projections_of_their_own_are_written_as_plain_loras(tmp_path, where):
    model = adapted(True, lro.adapters.VeRA(rank=3), where)
    with pytest.raises(ValueError, match="as_lora=False: PEFT has VeRA of linear layers only"):
        save_peft(model, tmp_path / "a", names=NAMES, as_lora=False)
    assert not (tmp_path / "a").exists()
    save_peft(model, tmp_path / "a", names=NAMES)
    config = read(tmp_path / "a")[0]
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 3)
    again = load_peft(Model(True), tmp_path / "a", names=NAMES)
    agree(output(again), output(model))


def test_ranks_that_differ_between_shapes_are_written_as_plain_loras(tmp_path):
    model, method = Model(True), lro.adapters.VeRA(rank=3)
    lro.adapters.attach(model, method, "query|out", rngs=0, rank_pattern={"query": 2})
    save_peft(model, tmp_path / "a", names=NAMES)
    assert read(tmp_path / "a")[0]["peft_type"] == "LORA"


def test_what_is_loaded_is_trained_further(tmp_path):
    path = vera_folder(tmp_path / "a")
    model = load_peft(Model(True), path, names=NAMES)
    trained = nnx.to_flat_state(nnx.state(model, lro.adapters.trainable))
    assert {name[-1] for name, _ in trained} == {"d", "b"}
    assert all(x[...].dtype == jnp.float32 for _, x in trained)


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    model = Model(True)
    before = snapshot(model)
    for number, changes in enumerate(({"r": 4}, {"save_projection": False}, {"vera_dropout": 2})):
        path = vera_folder(tmp_path / str(number), **changes)
        with pytest.raises(ValueError, match=r"vera_A|save_projection=False|vera_dropout must be"):
            load_peft(model, path, names=NAMES)
        assert snapshot(model) == before


@pytest.mark.parametrize("where", ["query|mlp", "out|mlp"])  # of 4 inputs, or of 4 outputs, each
def test_both_projections_must_be_those_of_one_pair(tmp_path, where):
    model = adapted(True, lro.adapters.VeRA(rank=3), where)
    groups = model.adapter_groups["default"].values()
    smaller = {}
    for name in "AB":  # the larger one begins with the smaller one
        smaller[name], large = sorted((g[name] for g in groups), key=lambda x: x.size)
        part = np.array(large[...])
        part[tuple(map(slice, smaller[name].shape))] = smaller[name][...]
        large.set_value(jnp.asarray(part))
    save_peft(model, tmp_path / "a", names=NAMES, as_lora=False)
    assert read(tmp_path / "a")[0]["peft_type"] == "VERA"
    for x in smaller.values():
        kept = x[...]
        x.set_value(kept.at[0, 0].add(1))
        with pytest.raises(ValueError, match="as_lora=False: PEFT has VeRA of linear layers only"):
            save_peft(model, tmp_path / "b", names=NAMES, as_lora=False)
        x.set_value(kept)
