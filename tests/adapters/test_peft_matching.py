"""PEFT's matching rules, with the cases that its own code was tried on."""

import pytest

from lowrank_optax.adapters.peft.config import PeftConfig, is_saved

Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        (Q0, {"target_modules": ("q_proj",)}, True),
        ("my_q_proj", {"target_modules": ("q_proj",)}, False),
        ("layers.0.my_q_proj", {"target_modules": ("q_proj",)}, False),
        ("q_proj", {"target_modules": ("q_proj",)}, True),
        (Q0, {"target_modules": (Q0,)}, True),
        (Q1, {"target_modules": (Q0,)}, False),
        (Q0, {"target_modules": "q_proj"}, False),
        (Q0, {"target_modules": r".*\.q_proj"}, True),
        (Q0, {"target_modules": r".*\.(q|v)_proj"}, True),
        (Q0, {"target_modules": None}, False),
        (Q0, {"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, False),
        (Q0, {"target_modules": ("q_proj",), "exclude_modules": "q_proj"}, True),
        (Q0, {"target_modules": ("q_proj",), "exclude_modules": r".*\.0\..*"}, False),
        (Q0, {"target_modules": ("q_proj",), "modules_to_save": ("self_attn",)}, False),
        ("lm_head", {"target_modules": ("lm_head",), "modules_to_save": ("lm_head",)}, False),
        (Q1, {"target_modules": ("q_proj",), "layers_to_transform": 1}, True),
        (Q0, {"target_modules": ("q_proj",), "layers_to_transform": (1, 2)}, False),
        (Q0, {"target_modules": ("q_proj",), "layers_to_transform": ()}, True),
        # Something must stand before the list of layers.
        ("layers.0.q_proj", {"target_modules": ("q_proj",), "layers_to_transform": 0}, False),
        # The first number is the layer, not the expert.
        ("m.layers.1.experts.0.w", {"target_modules": ("w",), "layers_to_transform": 1}, True),
        ("m.layers.1.experts.0.w", {"target_modules": ("w",), "layers_to_transform": 0}, False),
        (
            "layers.0.q_proj",
            {"target_modules": ("q_proj",), "layers_to_transform": 0, "layers_pattern": "layers"},
            True,
        ),
        (
            Q0,
            {"target_modules": ("q_proj",), "layers_to_transform": 0, "layers_pattern": ("h",)},
            False,
        ),
        # A whole name in the list, and a regular expression, ask for no layer.
        (Q0, {"target_modules": (Q0,), "layers_to_transform": 1}, True),
        (Q0, {"target_modules": r".*q_proj", "layers_to_transform": 1}, True),
    ],
)
def test_modules_are_selected_as_in_peft(name, config, expected):
    assert PeftConfig(**config).is_target(name) is expected


def test_the_first_pattern_in_the_files_order_counts():
    config = PeftConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 4, "q_proj": 2, "proj": 1},
        alpha_pattern={"q_proj": 3},
    )
    names = (Q0, Q1, "model.layers.0.self_attn.v_proj", "model.my_q_proj")
    assert [config.rank_of(n) for n in names] == [4, 2, 8, 8]
    assert [config.alpha_of(n) for n in names] == [3, 3, 16, 16]
    assert config.scale_of(Q0) == 3 / 4
    assert PeftConfig(r=16, lora_alpha=2, use_rslora=True).scale_of(Q0) == 0.5


def test_what_is_in_modules_to_save_is_saved():
    saved = ("lm_head", "model.layers.1.mlp")
    names = ("lm_head", "model.lm_head", "model.layers.1.mlp.up_proj", "model.layers.11.mlp")
    assert [is_saved(n, saved) for n in names] == [True, True, True, False]
