"""Arguments that are given by the names that they have in other libraries."""

from collections.abc import Callable, Iterable
import functools
import inspect
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Of torch.optim, bitsandbytes, the official GaLore, APOLLO and LDAdam, and Hugging Face PEFT.
_HERE = {
    "adapter_name": "name",
    "beta1": "b1",
    "beta2": "b2",
    "betas": "b1 and b2",
    "block_wise": "block_size",
    "blocksize": "block_size",
    "epsilon": "eps",
    "grad_accum_steps": "accumulate_steps",
    "gradient_accumulation_steps": "accumulate_steps",
    "init_lora_weights": "initial",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_rank": "rank",
    "lr": "learning_rate",
    "min_8bit_size": "min_size",
    "mini_r": "mini_rank",
    "miss_dropout": "dropout",
    "nbits": "bits",
    "optim_bits": "bits or state_bits",
    "proj_type": "side",
    "r": "rank",
    "randlora_alpha": "alpha",
    "randlora_dropout": "dropout",
    "scale_type": "granularity",
    "sparse": "bases",
    "step_size": "learning_rate",
    "target_modules": "where",
    "theta": "threshold",
    "update_interval": "refresh_every",
    "update_proj_gap": "refresh_every",
    "use_rslora": "rank_stabilized",
    "vera_dropout": "dropout",
    "very_sparse": "bases",
    "wd": "weight_decay",
}


def check_names(function: str, parameters: Iterable[str], given: Iterable[str]) -> None:
    """Raises TypeError for an argument's name elsewhere, with the one that it has here.

    Example:
      >>> check_names("LoRA", ["rank", "alpha"], ["lora_alpha"])
      Traceback (most recent call last):
        ...
      TypeError: LoRA has no argument 'lora_alpha'; here it is called alpha.
    """
    own = set(parameters)
    for name in given:
        names = _HERE.get(name, "").split(" ")
        if name not in own and (here := [x for x in names if x in own]):
            raise TypeError(
                f"{function} has no argument {name!r}; here it is called {' and '.join(here)}."
            )


def explains_names(function: Callable[P, R]) -> Callable[P, R]:
    """Makes ``function`` answer names that its arguments have elsewhere: see `check_names`."""
    parameters: Any = inspect.signature(function).parameters

    @functools.wraps(function)
    def explained(*args: P.args, **kwargs: P.kwargs) -> R:
        check_names(function.__name__, parameters, kwargs)
        return function(*args, **kwargs)

    return explained
