"""Arguments by the names that they have in other libraries are answered with ours."""

from collections.abc import Callable
import inspect
from typing import Any

import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.matrices.argument_names import check_names

LoRA = lro.adapters.LoRA


@pytest.mark.parametrize(
    ("function", "given", "here"),
    [
        (lro.galore, "update_proj_gap", "refresh_every"),
        (lro.apollo, "lr", "learning_rate"),
        (lro.nag_gs, "lr", "learning_rate"),
        (lro.cautious_adamw, "betas", "b1 and b2"),
        (lro.low_bit, "optim_bits", "bits"),
        (lro.fused_adamw, "betas", "b1 and b2"),
        (LoRA, "lora_alpha", "alpha"),
        (LoRA, "r", "rank"),
        (lro.adapters.DoRA, "lora_dropout", "dropout"),
        (lro.adapters.MiSS, "mini_r", "mini_rank"),
        (lro.adapters.MiSS, "miss_dropout", "dropout"),
        (lro.adapters.VeRA, "vera_dropout", "dropout"),
        (lro.adapters.RandLoRA, "randlora_dropout", "dropout"),
        (lro.adapters.RandLoRA, "randlora_alpha", "alpha"),
        (lro.adapters.RandLoRA, "sparse", "bases"),
        (lro.adapters.RandLoRA, "very_sparse", "bases"),
        (lro.adapters.SaRA, "theta", "threshold"),
        (lro.adapters.attach, "target_modules", "where"),
    ],
)
def test_a_name_from_elsewhere_is_answered_with_the_one_here(
    function: Callable[..., Any], given: str, here: str
) -> None:
    with pytest.raises(TypeError, match=rf"^\w+ has no argument '{given}'; .* called {here}\.$"):
        function(**{given: 1})
    assert not {given} & inspect.signature(function).parameters.keys()


def test_an_unknown_name_is_python_s_own_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        LoRA(rank=1, colour=1)  # pyrefly: ignore
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        lro.low_bit(optax.adam(1e-3), colour=1)  # pyrefly: ignore
    check_names("f", ["r"], ["r", "lora_alpha"])  # its own name, and one that is nothing here
