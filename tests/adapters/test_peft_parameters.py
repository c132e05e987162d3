"""LoRA of stacks of experts in PEFT's files: ``target_parameters``."""

from close import assert_close
from flax import nnx
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax import cli
from lowrank_optax.adapters import UnsupportedConfigError, fold_peft, load_peft, save_peft
from lowrank_optax.storage.safetensors_files import CheckpointMismatchError
from tests.adapters.expert_layers import (
    DIM,
    EXPERTS,
    NAMES,
    SIDES,
    Model,
    adapted,
    kernels,
    output,
)
from tests.adapters.peft_files import random_tensors, read, snapshot, write

pytest.importorskip("safetensors")

LORA = lro.adapters.LoRA(rank=2, alpha=5, initial="random")
# Of the three parameters of a module, in this order, PEFT wraps the first innermost.
WRAPPERS = {"gate": ".base_layer.base_layer", "up": ".base_layer", "down": ""}
PREFIX = "base_model.model.model.layers.{}.experts{}.lora_{}.weight"


def expert_folder(folder, wrappers=WRAPPERS, rank_of=lambda name, layer: 2, **changes):
    """LoRA on the experts of both layers of `Model`, as PEFT writes it."""
    shapes = {}
    for name, wrapper in wrappers.items():
        d_in, d_out = SIDES[name]
        for layer in range(2):
            rank = rank_of(name, layer)
            shapes[PREFIX.format(layer, wrapper, "A")] = (EXPERTS * rank, d_in)
            shapes[PREFIX.format(layer, wrapper, "B")] = (d_out, rank * EXPERTS)
    targets = [f"experts.{name}_proj" for name in wrappers]
    config = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": targets}
    return write(folder, config | changes, random_tensors(shapes))


def changes(tensors, wrappers=WRAPPERS, alpha_of=lambda name, layer: 3):
    """What PEFT adds to the weights, ``[layers, experts, d_in, d_out]``, expert by expert."""
    found = {}
    for name, wrapper in wrappers.items():
        found[name] = np.zeros((2, EXPERTS, *SIDES[name]))
        for layer, expert in np.ndindex(2, EXPERTS):
            a, b = (tensors[PREFIX.format(layer, wrapper, x)].astype(np.float64) for x in "AB")
            rank = len(a) // EXPERTS
            for r in range(rank):
                outer = np.outer(a[expert * rank + r], b[:, r * EXPERTS + expert])
                found[name][layer, expert] += alpha_of(name, layer) / rank * outer
    return found


def check_merged(model, expected, epsilons=8):
    """The weights of a model, merged, differ from what they were by these changes."""
    before = kernels(model)
    lro.adapters.merge(model)
    for name, after in kernels(model).items():
        assert_close(after, before[name] + expected.get(name, 0), epsilons)


def refused(folder, error, match, call=load_peft, names=NAMES):
    """A folder is refused, and the model is left as it was."""
    model = Model(True)
    before = snapshot(model)
    with pytest.raises(error, match=match):
        call(model, folder, names=names)
    assert snapshot(model) == before


@pytest.mark.parametrize("stacked", [True, False])
def test_a_file_changes_the_experts_as_numpy_says(tmp_path, stacked):
    expert_folder(tmp_path)
    expected = changes(read(tmp_path)[1])
    model = load_peft(Model(stacked), tmp_path, names=NAMES)
    before, y = kernels(model), output(model)
    check_merged(model, expected)
    folded = fold_peft(Model(stacked), tmp_path, names=NAMES)
    for name, weight in kernels(folded).items():
        assert_close(weight, before[name] + expected[name], 8)
    assert_close(output(folded), y, 400)


@pytest.mark.parametrize("stacked", [True, False])
def test_saved_experts_are_the_merged_change(tmp_path, stacked):
    model = adapted(stacked, LORA)
    save_peft(model, tmp_path, names=NAMES)
    config, tensors = read(tmp_path)
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 5, [])
    parameters = [f"model.layers.{i}.experts.{name}_proj" for i in range(2) for name in SIDES]
    assert config["target_parameters"] == sorted(parameters)
    check_merged(model, changes(tensors, alpha_of=lambda name, layer: 5))
    again = load_peft(Model(not stacked), tmp_path, names=NAMES)
    save_peft(again, tmp_path / "b", names=NAMES)
    assert read(tmp_path / "b")[0] == config
    assert all((read(tmp_path / "b")[1][k] == x).all() for k, x in tensors.items())


def test_only_adapted_parameters_are_wrapped(tmp_path):
    model = adapted(True, LORA, "experts/(up|gate)")
    save_peft(model, tmp_path, names=NAMES)
    tensors, wrappers = read(tmp_path)[1], {"gate": ".base_layer", "up": ""}
    assert len(tensors) == 8
    check_merged(model, changes(tensors, wrappers, lambda name, layer: 5))


def test_the_order_of_names_is_that_of_registration(tmp_path):
    expert_folder(tmp_path)
    in_order = lambda key: {path: NAMES[path] for path in sorted(NAMES, key=key)}
    last = in_order(lambda path: "gate" in path)  # up, down, mix, gate
    refused(tmp_path, CheckpointMismatchError, "lora_A", names=last)
    first = in_order(lambda path: "up" not in path)  # up, gate, down, mix
    wrappers = WRAPPERS | {"gate": WRAPPERS["up"], "up": WRAPPERS["gate"]}
    model = load_peft(Model(True), tmp_path, names=first)
    check_merged(model, changes(read(tmp_path)[1], wrappers))


def test_a_function_of_paths_names_one_parameter_of_a_module(tmp_path):
    def names(path):
        return NAMES[path.replace("layers/", "layers/{}/")]

    expert_folder(tmp_path / "a")
    for call in (load_peft, fold_peft):
        refused(tmp_path / "a", ValueError, "names is a function.*as a mapping", call, names)
    expert_folder(tmp_path / "b", {"down": ""})
    model = load_peft(Model(True), tmp_path / "b", names=names)
    with pytest.raises(ValueError, match="names is a function"):
        save_peft(adapted(True, LORA), tmp_path / "c", names=names)
    save_peft(model, tmp_path / "c", names=names)
    first, second = read(tmp_path / "b")[1], read(tmp_path / "c")[1]
    assert first.keys() == second.keys()
    assert all((first[k] == second[k]).all() for k in first)


@pytest.mark.parametrize("stacked", [True, False])
def test_parameters_have_ranks_and_alphas_of_their_own(tmp_path, stacked):
    fields = {
        "rank_pattern": {"experts.up_proj": 1, r"layers\.0\.experts\.down_proj": 3},
        "alpha_pattern": {r"layers\.0\.experts\.gate_proj": 7},
    }
    rank_of = lambda name, layer: {("up", 0): 1, ("up", 1): 1, ("down", 0): 3}.get((name, layer), 2)
    folder = expert_folder(tmp_path / "a", rank_of=rank_of, **fields)
    model, tensors = load_peft(Model(stacked), folder, names=NAMES), read(folder)[1]
    save_peft(model, tmp_path / "b", names=NAMES)
    again = read(tmp_path / "b")[1]
    assert again.keys() == tensors.keys()
    assert all((again[k] == x).all() for k, x in tensors.items())
    alpha_of = lambda name, layer: 7 if (name, layer) == ("gate", 0) else 3
    check_merged(model, changes(tensors, alpha_of=alpha_of))


def test_experts_of_different_ranks_become_a_plain_lora(tmp_path):
    model = adapted(True, LORA, "gate", rank_pattern={"gate": (1, 2, 3, 1, 1, 1)})
    save_peft(model, tmp_path, names=NAMES)
    tensors = read(tmp_path)[1]
    shapes = [tensors[PREFIX.format(layer, "", "A")].shape for layer in range(2)]
    assert shapes == [(EXPERTS * 3, DIM), (EXPERTS, DIM)]
    alpha_of = lambda name, layer: (3, 5)[layer]  # the scale is in the factors of layer 0
    check_merged(model, changes(tensors, {"gate": ""}, alpha_of), 16)
    model = load_peft(Model(False), tmp_path, names=NAMES)
    check_merged(model, changes(tensors, {"gate": ""}, alpha_of), 16)


def test_experts_of_different_ranks_keep_the_scale_of_other_layers(tmp_path):
    method = lro.adapters.LoRA(rank=4, alpha=5, rank_stabilized=True, initial="random")
    model = adapted(True, method, "gate|mix", rank_pattern={"gate": (1, 2, 3, 1, 1, 1)})
    save_peft(model, tmp_path, names=NAMES)
    assert read(tmp_path)[0]["use_rslora"]
    assert_close(output(load_peft(Model(False), tmp_path, names=NAMES)), output(model), 400)


@pytest.mark.parametrize("method", [lro.adapters.VeRA(rank=2), lro.adapters.LoTR(rank=2)])
def test_factors_that_experts_share_are_written_for_each(tmp_path, method):
    model = adapted(True, method, "gate|up")
    save_peft(model, tmp_path, names=NAMES)
    assert_close(output(load_peft(Model(False), tmp_path, names=NAMES)), output(model), 400)


def test_layers_inside_a_module_of_parameters_are_inside_its_wrappers(tmp_path):
    names = NAMES | {"layers/{}/mix": "model.layers.{}.experts.mix"}
    model = adapted(True, LORA, "up|down|mix")
    save_peft(model, tmp_path, names=names)
    config, tensors = read(tmp_path)
    assert config["target_modules"] == ["mix"]
    assert PREFIX.format(1, ".base_layer.base_layer.mix", "A") in tensors
    assert_close(output(load_peft(Model(False), tmp_path, names=names)), output(model), 400)


def test_layers_inside_a_module_of_parameters_are_not_trained_themselves(tmp_path):
    names = NAMES | {"layers/{}/mix": "model.layers.{}.experts.mix"}
    match = "modules_to_save has model.layers.0.experts.mix.*trains no module inside"
    folder = expert_folder(tmp_path / "theirs", modules_to_save=["mix"])
    refused(folder, UnsupportedConfigError, match, names=names)
    model = adapted(True, LORA, "up|down")
    lro.adapters.also_train(model, "mix")
    with pytest.raises(UnsupportedConfigError, match=match):
        save_peft(model, tmp_path / "ours", names=names)
    assert not (tmp_path / "ours").exists()


def test_other_ranks_shapes_and_names_are_refused(tmp_path):
    for number, (fields, error, match) in enumerate((
        ({"r": 3}, CheckpointMismatchError, "experts.lora_A.weight"),
        ({"target_parameters": ["experts.gate_proj"]}, CheckpointMismatchError, "base_layer"),
        ({"target_parameters": ["experts.gate"]}, ValueError, "target_parameters.*gate_proj"),
        ({"target_parameters": ["xperts.up_proj"]}, ValueError, "target_parameters.*'xperts"),
        ({"target_parameters": "experts"}, ValueError, "target_parameters must be a list"),
        ({"target_parameters": None}, ValueError, "selects no layer"),
        ({"target_modules": ["gate_proj"]}, ValueError, "target_modules .*has 'gate_proj'"),
        ({"rank_pattern": {"mix": 1}}, ValueError, "rank_pattern .*'mix'"),
        ({"use_dora": True}, UnsupportedConfigError, "use_dora=True of experts .model"),
        ({"init_lora_weights": "pissa"}, UnsupportedConfigError, "pissa.* no linear layer"),
        ({"modules_to_save": ["experts"]}, UnsupportedConfigError, "has the parameter model"),
        ({"peft_type": "VERA"}, UnsupportedConfigError, r"target_parameters=\['experts.gate_pr"),
    )):  # fmt: skip
        folder = expert_folder(tmp_path / str(number), **fields)
        refused(folder, error, match)
        refused(folder, error, match, fold_peft)
    config, tensors = read(expert_folder(tmp_path / "a"))
    swapped = {n: x.T for n, x in tensors.items()}  # as of a PEFT before 0.19.1
    swapped = {n.replace("lora_A", "lora_C"): x for n, x in swapped.items()}
    swapped = {n.replace("lora_B", "lora_A").replace("_C", "_B"): x for n, x in swapped.items()}
    refused(write(tmp_path / "a", config, swapped), CheckpointMismatchError, "lora_A")


def test_a_name_that_is_no_stack_of_experts_is_refused(tmp_path):
    expert_folder(tmp_path)
    names = {"layers/{}/mix": "model.layers.{}.experts"}
    refused(tmp_path, UnsupportedConfigError, "no parameter that is one.*nnx.Einsum", names=names)
    names = NAMES | {"layers/{}/experts/gate": "gate_proj_{}"}
    write(tmp_path, {"r": 2, "target_modules": [], "target_parameters": ["gate_proj_0"]}, {
        "base_model.model.gate_proj_0.lora_A.weight": np.zeros((6, DIM), np.float32),
    })  # fmt: skip
    refused(tmp_path, ValueError, "'gate_proj_0' is no parameter of a module", names=names)


def test_square_experts_of_an_old_file_are_warned_of(tmp_path):
    layer = nnx.Einsum("ebd,edf->ebf", (2, 3, 3), rngs=nnx.Rngs(0))
    names = {"layers/{}": "model.{}.gate_proj"}
    tensors = random_tensors({
        "base_model.model.model.0.lora_A.weight": (2, 3),
        "base_model.model.model.0.lora_B.weight": (3, 2),
    })  # fmt: skip
    config = {"r": 1, "target_modules": [], "target_parameters": ["gate_proj"]}
    write(tmp_path, config | {"peft_version": "0.18.1"}, tensors)
    with pytest.warns(UserWarning, match=r"PEFT 0\.18\.1.*transposed"):
        load_peft(nnx.Sequential(layer), tmp_path, names=names)
    lro.adapters.detach(layer)
    write(tmp_path, config | {"peft_version": "0.19.1"}, tensors)
    load_peft(nnx.Sequential(layer), tmp_path, names=names)


def test_what_peft_cannot_hold_of_experts_is_not_written(tmp_path):
    dora = adapted(True, lro.adapters.DoRA(rank=2))
    with pytest.raises(ValueError, match=r"layers/experts/\w+: DoRA of experts cannot"):
        save_peft(dora, tmp_path, names=NAMES)
    trained = adapted(True, LORA, "mix")
    lro.adapters.also_train(trained, "experts/up")
    with pytest.raises(ValueError, match="layers/experts/up: it is trained itself"):
        save_peft(trained, tmp_path, names=NAMES)
    assert not list(tmp_path.iterdir())
    lro.adapters.attach(trained, LORA, "experts/up", rngs=0, name="b")
    save_peft(trained, tmp_path / "b", name="b", names=NAMES)
    assert all("lora_" in name for name in read(tmp_path / "b")[1])
    dropping = adapted(True, lro.adapters.LoRA(rank=2, dropout=0.25), "up|mix")
    with pytest.warns(UserWarning, match=r"dropout=0\.25 is written as lora_dropout=0"):
        save_peft(dropping, tmp_path / "c", names=NAMES)
    assert read(tmp_path / "c")[0]["lora_dropout"] == 0


def test_the_command_refuses_experts_and_casts_them(tmp_path, capsys):
    expert_folder(tmp_path / "a")
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "b")]
    assert cli.main([*arguments, "--plain-lora"]) == 1
    assert "do not show the order" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert cli.main([*arguments, "--dtype", "bfloat16"]) == 0
    load_peft(Model(True), tmp_path / "b", names=NAMES)
