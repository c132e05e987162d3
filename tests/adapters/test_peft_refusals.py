"""What is refused of a folder of PEFT: by name, whole, and with nothing attached."""

import dataclasses
import functools
import json
import sys

import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters import UnsupportedConfigError, load_peft, save_peft
from lowrank_optax.adapters.peft.config import _REFUSED
from lowrank_optax.adapters.peft.parsing import parse_config
from lowrank_optax.storage.safetensors_files import CheckpointMismatchError
from tests.adapters.peft_files import (
    DIM,
    NAMES,
    Model,
    adapted,
    changed,
    query_folder,
    read,
    refused,
    snapshot,
    write,
)

pytest.importorskip("safetensors")

Q = "base_model.model.model.layers.{}.self_attn.q_proj"
LORA = lro.adapters.LoRA(rank=2, alpha=5, initial="random")
OF_NO_LORA = _REFUSED.keys() - {"target_parameters"}
refused = functools.partial(refused, load=load_peft)


@pytest.fixture
def folder(tmp_path):
    return query_folder(tmp_path / "a")


def refused_each(tmp_path, error, cases):
    """Each set of changes of the configuration is refused with its message."""
    for number, (changes, match) in enumerate(cases):
        refused(query_folder(tmp_path / str(number), **changes), error, match)


def test_a_field_that_changes_the_function_is_refused_by_name(tmp_path):
    assert len(_REFUSED) == 11
    cases = [({field: [1, 2]}, rf"{field}=\[1, 2\] \(.*unsupported") for field in OF_NO_LORA]
    refused_each(tmp_path, UnsupportedConfigError, cases)
    for field in OF_NO_LORA:
        for off in (None, False, [], {}):
            parse_config({"peft_type": "LORA", field: off})


def test_an_initialisation_that_changed_the_base_is_refused(tmp_path):
    matches = (
        ("olora", "changed: have PEFT convert"),
        ("loftq", "changed: have PEFT convert"),
        ("pissa_niter_16", "random: have PEFT convert"),
        ("made_up", "unknown"),
    )
    cases = [
        ({"init_lora_weights": initial}, f"init_lora_weights='{initial}'.*{match}")
        for initial, match in matches
    ]
    refused_each(tmp_path, UnsupportedConfigError, cases)


def test_all_refusals_are_in_one_message(folder):
    changed(folder, lora_bias=True, use_qalora=True, init_lora_weights="corda")
    error = refused(folder, UnsupportedConfigError, "lora_bias=True")
    assert "use_qalora=True" in str(error)
    assert "init_lora_weights='corda'" in str(error)


def test_other_types_are_refused(tmp_path):
    matches = (
        ("BOFT", "peft_type='BOFT' is not supported, only LORA, ADALORA, .*, RANDLORA are"),
        ("VBLORA", "peft_type='VBLORA'"),
        (None, "no peft_type"),
    )
    cases = [({"peft_type": kind}, match) for kind, match in matches]
    refused_each(tmp_path, UnsupportedConfigError, cases)


def test_unknown_fields_are_warned_of_and_kept(folder):
    content = {"peft_type": "LORA", "sparkle": 3, "later_field": None, "revision": "main"}
    with pytest.warns(UserWarning, match=r"not known here: sparkle=3\."):
        config = parse_config(content)
    written = json.loads(json.dumps(config.content()))
    assert {k: written[k] for k in ("sparkle", "revision")} == {"sparkle": 3, "revision": "main"}


def test_values_that_a_field_cannot_have_are_refused(tmp_path):
    match = r"adapter_config\.json is damaged: .*must be|no regular expression"
    changes = (
        {"r": 0},
        {"r": "8"},
        {"rank_pattern": {"q": 1.5}},
        {"alpha_pattern": {"q": "1"}},
        {"lora_dropout": 1.0},
        {"bias": "some"},
        {"target_modules": "(q"},
        {"rank_pattern": {"(": 2}},
    )
    refused_each(tmp_path, ValueError, [(change, match) for change in changes])


def test_a_target_that_is_not_in_the_model_lists_near_ones(folder):
    changed(folder, target_modules=["q_projj"])
    refused(folder, ValueError, r"target_modules of .* has 'q_projj', .*it has q_proj, ")


def test_dora_of_part_of_a_stack_is_refused(folder):
    config, tensors = read(folder)
    tensors |= {f"{Q.format(0)}.lora_magnitude_vector": np.ones(6, np.float32)}
    kept = {k: x for k, x in tensors.items() if ".layers.0." in k}
    write(folder, config | {"use_dora": True, "layers_to_transform": 0}, kept)
    refused(folder, UnsupportedConfigError, "DoRA of 1 of the 3 layers stacked at layers/query")
    load_peft(Model(False), folder, names=NAMES)


def test_tensors_that_do_not_fit_are_all_listed(folder):
    config, tensors = read(folder)
    del tensors[f"{Q.format(0)}.lora_A.weight"]
    tensors[f"{Q.format(1)}.lora_B.weight"] = np.zeros((5, 2), np.float32)
    tensors[f"{Q.format(2)}.lora_A.weight"] = np.zeros((2, DIM), np.int32)
    tensors[f"{Q.format(7)}.lora_A.weight"] = np.zeros((2, DIM), np.float32)
    write(folder, config, tensors)
    error = refused(folder, CheckpointMismatchError, "does not fit its configuration and the model")
    assert error.missing == [f"{Q.format(0)}.lora_A.weight"]
    assert error.extra == [f"{Q.format(7)}.lora_A.weight"]
    assert error.wrong_shape == {f"{Q.format(1)}.lora_B.weight": ((5, 2), (6, 2))}
    assert error.wrong_dtype == {f"{Q.format(2)}.lora_A.weight": "I32"}


def test_a_rank_that_is_not_the_tensors_is_refused(folder):
    changed(folder, rank_pattern={r"layers\.1\..*": 3})
    error = refused(folder, CheckpointMismatchError, r"\(2, 4\), not \(3, 4\)")
    assert len(error.wrong_shape) == 2


def test_names_without_the_prefix_are_refused(folder):
    config, tensors = read(folder)
    short = {k.removeprefix("base_model.model."): x for k, x in tensors.items()}
    write(folder, config, short)
    refused(folder, ValueError, r"lack the prefix 'base_model\.model\.'.*PEFT would not.*q_proj")


def test_a_truncated_file_is_refused_whole(folder):
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    for kept in (0, 4, 100, -1):
        file.write_bytes(whole[:kept])
        error = refused(folder, CheckpointMismatchError, "unusable files")
        assert list(error.files) == ["adapter_model.safetensors"]


def test_a_damaged_config_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LO')
    refused(folder, ValueError, r"adapter_config\.json is damaged")
    (folder / "adapter_config.json").write_text("[1]")
    refused(folder, ValueError, "holds no JSON object")


def test_pickles_are_refused_with_the_reason(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, ValueError, r"adapter_model\.bin is a pickle.*runs whatever program")
    (folder / "adapter_model.bin").unlink()
    refused(folder, FileNotFoundError, r"holds no adapter_model\.safetensors")


def test_a_folder_of_folders_says_which_hold_adapters(folder):
    refused(folder.parent, FileNotFoundError, r"holds no adapter_config\.json; its folders a do")


def test_a_name_that_is_taken_is_refused(folder):
    model = load_peft(Model(True), folder, names=NAMES)
    before = snapshot(model)
    with pytest.raises(ValueError, match="has an adapter named 'default' already"):
        load_peft(model, folder, names=NAMES)
    assert snapshot(model) == before


def test_names_are_needed_and_must_be_right(folder, tmp_path):
    with pytest.raises(ValueError, match="names=None: Model has no huggingface_names"):
        load_peft(Model(True), folder)
    with pytest.raises(ValueError, match="names has none of the model's modules, which are "):
        load_peft(Model(True), folder, names={"other": "name"})
    twice = {"layers/{}/query": "layers.{}.q", "layers/{}/out": "layers.{}.q"}
    with pytest.raises(ValueError, match=r"both called layers\.0\.q"):
        load_peft(Model(True), folder, names=twice)
    with pytest.raises(ValueError, match=r"a stack of \(3,\) matrices, but .* 0 number"):
        load_peft(Model(True), folder, names=lambda path: path.replace("/query", ".q_proj"))
    for wrong in ({"layers/{}/query": "q_proj"}, {"layers/query": "layers.{}.q_proj"}):
        with pytest.raises(ValueError, match=r"other numbers of \{\} than names"):
            load_peft(Model(True), folder, names=wrong)
    more = NAMES | {"tpyo/{}": "x.{}", "layers/{}/qury": "layers.{}.q"}
    match = r"names has 'tpyo/\{\}', 'layers/\{\}/qury', which match no module.*near it are"
    with pytest.raises(ValueError, match=match):
        load_peft(Model(True), folder, names=more)
    some = {k: v for k, v in NAMES.items() if "mlp" not in k}
    with pytest.raises(ValueError, match=r"no PyTorch name of layers/mlp"):
        save_peft(adapted(True, LORA, "query|mlp"), tmp_path / "b", names=some)


@pytest.mark.slow
def test_what_a_file_cannot_hold_is_not_saved(tmp_path):
    model = adapted(True, LORA, "query|mlp")
    with pytest.raises(ValueError, match="no adapter named 'x': it has 'default'"):
        save_peft(model, tmp_path / "a", names=NAMES, name="x")
    with pytest.raises(ValueError, match=r"dtype=.*int.* must be one of float32, bfloat16"):
        save_peft(model, tmp_path / "a", names=NAMES, dtype=int)
    lro.adapters.activate(model, "default", strengths={"default": 0.5})
    with pytest.raises(ValueError, match=r"layers/.*: the adapter's strength is 0\.5"):
        save_peft(model, tmp_path / "a", names=NAMES)
    dora = adapted(True, lro.adapters.DoRA(rank=2), "query")
    with pytest.raises(TypeError, match="DoRA rescales"):
        save_peft(dora, tmp_path / "a", names=NAMES, as_lora=True)
    lro.adapters.attach(dora, LORA, "mlp", rngs=0)
    with pytest.raises(ValueError, match="one file holds one method, and the layers have 2"):
        save_peft(dora, tmp_path / "a", names=NAMES)
    lotr = adapted(True, lro.adapters.LoTR(rank=2), "query")
    with pytest.raises(TypeError, match="PEFT has no LoTR"):
        save_peft(lotr, tmp_path / "a", names=NAMES, as_lora=False)
    fast = adapted(True, lro.adapters.PiSSA(rank=2, power_iterations=2), "query")
    with pytest.raises(ValueError, match="PEFT computes PiSSA's residual base again"):
        save_peft(fast, tmp_path / "a", names=NAMES, as_lora=False)
    both = adapted(True, LORA, "mlp")
    lro.adapters.also_train(both, "mlp/kernel")
    with pytest.raises(ValueError, match="trained itself and has an adapter"):
        save_peft(both, tmp_path / "a", names=NAMES)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    from safetensors import numpy as safetensors_numpy

    model = adapted(True, LORA, "query")
    save_peft(model, tmp_path / "a", names=NAMES)
    (tmp_path / "a" / "README.md").write_text("mine")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_numpy, "save_file", full)
        with pytest.raises(OSError, match="no space left"):
            save_peft(adapted(True, LORA, "mlp"), tmp_path / "a", names=NAMES)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    save_peft(adapted(True, LORA, "mlp"), tmp_path / "a", names=NAMES)
    assert (tmp_path / "a" / "README.md").read_text() == "mine"
    assert read(tmp_path / "a")[0]["target_modules"] == ["mlp"]


def test_other_folders_are_not_written_over(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("...")
    with pytest.raises(FileExistsError, match="holds other things than an adapter"):
        save_peft(adapted(True, LORA, "query"), tmp_path / "a", names=NAMES)


def test_a_missing_safetensors_is_one_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(folder, ImportError, r"need safetensors: pip install 'lowrank_optax\[peft\]'")
    with pytest.raises(ImportError, match="need safetensors"):
        save_peft(adapted(True, LORA, "query"), tmp_path / "b", names=NAMES)


WRONG = (["x"], float("nan"), float("inf"), -(10**400), -1, -1.5, "", "x", [], {}, {"x": -1}, None)
FIELDS = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 3,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "target_modules": ["q_proj"],
    "exclude_modules": ["o_proj"],
    "layers_to_transform": [0, 1, 2],
    "layers_pattern": ["layers"],
    "rank_pattern": {r"1\.self_attn\.q_proj": 2},
    "alpha_pattern": {r"1\.self_attn\.q_proj": 3},
    "modules_to_save": ["lm_head"],
    "bias": "none",
    "fan_in_fan_out": False,
    "ensure_weight_tying": False,
    "target_parameters": [],
}
# Values that are right: off, as PEFT reads them, or another scale.
RIGHT = {
    ("lora_alpha", "-1"),
    ("lora_alpha", "-1.5"),
    ("init_lora_weights", "None"),
    ("layers_pattern", "[]"),
    ("layers_pattern", "''"),
    ("layers_pattern", "None"),
    ("layers_to_transform", "[]"),
    *((field, value) for field in ("rank_pattern", "alpha_pattern") for value in ("{}", "None")),
    *(("exclude_modules", value) for value in ("[]", "''", "None")),
}


@pytest.mark.filterwarnings("ignore:exclude_modules")
def test_every_field_of_a_file_is_refused_by_name_or_right(tmp_path):
    folder = query_folder(tmp_path / "a", **FIELDS)
    config, tensors = read(folder)
    tensors["base_model.model.lm_head.weight"] = np.ones((7, DIM), np.float32)
    write(folder, config, tensors)
    expected = arrays_of(load_peft(Model(True), folder, names=NAMES))
    model = Model(True)
    before = snapshot(model)
    for field in FIELDS:
        for value in WRONG:
            text = json.dumps(config | {field: value})
            (folder / "adapter_config.json").write_text(text)
            error = error_of(model, folder)
            if error:
                named = field in error or (field == "modules_to_save" and "lm_head" in error)
                assert named, (field, value, error)
                assert snapshot(model) == before
                continue
            found = arrays_of(model)
            lro.adapters.detach(model)
            assert snapshot(model) == before, (field, value)
            assert found == expected or (field, repr(value)) in RIGHT, (field, value)


@pytest.mark.parametrize(
    "field", [*sorted(OF_NO_LORA), "base_model_name_or_path", "inference_mode"]
)
def test_every_other_field_is_refused_by_name_or_has_no_effect(field):
    expected = parse_config(FIELDS)
    for value in WRONG:
        try:
            found = parse_config({**FIELDS, field: value})
        except UnsupportedConfigError as error:
            assert field in str(error)  # noqa: PT017
        else:
            assert field not in OF_NO_LORA or not value
            assert dataclasses.replace(found, others={}) == dataclasses.replace(expected, others={})


def error_of(model, folder):
    try:
        load_peft(model, folder, names=NAMES)
    except ValueError as error:
        return str(error)
    return ""


def arrays_of(model):
    """An adapted model's variables, and the scale."""
    method = model.layers.query.adapters["default"].method
    return snapshot(model), method.scale_of(2)


def test_the_order_of_fields_and_tensors_does_not_matter(folder, tmp_path):
    config, tensors = read(folder)
    (tmp_path / "b").mkdir()
    backwards = dict(reversed(list(tensors.items())))
    names = sorted(tensors)
    header, data, at = {}, b"", 0
    for name in reversed(names):  # the writer sorts them, so by hand
        x = backwards[name]
        header[name] = {
            "dtype": "F32",
            "shape": list(x.shape),
            "data_offsets": [at, at + x.nbytes],
        }
        data, at = data + x.tobytes(), at + x.nbytes
    text = json.dumps(header).encode()
    file = tmp_path / "b" / "adapter_model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    backwards = json.dumps(dict(reversed(list(config.items()))))
    (tmp_path / "b" / "adapter_config.json").write_text(backwards)
    one, two = (load_peft(Model(True), f, names=NAMES) for f in (folder, tmp_path / "b"))
    assert arrays_of(one) == arrays_of(two)


def test_foreign_files_are_refused_with_what_to_do(folder, tmp_path):
    config, tensors = read(folder)
    c_attn = {k.replace("q_proj", "c_attn"): x for k, x in tensors.items()}
    write(tmp_path / "b", config | {"target_modules": ["c_attn"]}, c_attn)
    match = r"changes model\.layers\.0\.self_attn\.c_attn, .* It has .*q_proj.* another archit"
    refused(tmp_path / "b", ValueError, match)
    refused(changed(folder, peft_type="BOFT"), UnsupportedConfigError, "Merge it in PEFT .*load")
    (folder / "adapter_model.safetensors").write_bytes(b"PK\x03\x04 is another format")
    write_config = json.dumps({"peft_type": "LORA", **config})
    (folder / "adapter_config.json").write_text(write_config)
    refused(folder, CheckpointMismatchError, "are damaged, truncated or missing")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules .*'v_proj'.*has q_proj, o_proj"),
        ({"target_modules": ["q_proj", "norm"]}, "target_modules .*'norm'"),
        ({"modules_to_save": ["lm_heads"]}, r"modules_to_save .*'lm_heads'.*has lm_head\."),
        ({"rank_pattern": {"k_proj": 2}}, "rank_pattern .*'k_proj'.*has q_proj"),
        ({"alpha_pattern": {"q_proj": 3, "o_proj": 2}}, "alpha_pattern .*'o_proj'"),
        ({"layers_to_transform": [0, 1, 2, 3]}, "layers_to_transform=3 .*selects none of"),
        ({"target_modules": ".*v_proj"}, r"target_modules='\.\*v_proj' .*selects no layer"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "layers_to_transform and"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, "use_dora=True with init_lora_weights"),
    ],
)
def test_names_and_patterns_that_match_nothing_are_refused(folder, changes, match):
    refused(changed(folder, **changes), ValueError, match)


def test_heads_that_peft_adds_for_a_task_may_be_absent(folder):
    config, tensors = read(folder)
    tensors["base_model.model.score.weight"] = np.ones((7, DIM), np.float32)
    heads = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    write(folder, config | heads, tensors)
    model = load_peft(Model(True), folder, names=NAMES | {"head": "score"})
    assert (np.asarray(model.head.kernel[...]) == 1).all()


def test_an_exclusion_of_nothing_is_warned_of(folder):
    with pytest.warns(UserWarning, match="exclude_modules='vision' .* excludes nothing"):
        load_peft(
            Model(True),
            changed(folder, exclude_modules=["vision"]),
            names=NAMES | {"picture": "patches"},
        )
