"""Nonlinearities whose backward pass keeps a few bits, and policies of what is saved."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank_optax.activations.calls import FewBitCalls, few_bit_calls
from lowrank_optax.activations.calls_report import CallsReport, CallsRow
from lowrank_optax.activations.codebooks import Codebook, codebook
from lowrank_optax.activations.coded_backward import few_bit
from lowrank_optax.activations.functions import (
    celu,
    elu,
    gelu,
    hard_sigmoid,
    hard_silu,
    hard_swish,
    hard_tanh,
    leaky_relu,
    log_sigmoid,
    mish,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    soft_sign,
    softplus,
    squareplus,
    swish,
    tanh,
)
from lowrank_optax.activations.gating import gated, geglu, swiglu
from lowrank_optax.activations.policies import Policy, policy

if TYPE_CHECKING:
    from lowrank_optax.activations import linen
    from lowrank_optax.activations.replacing import (
        QuantizedRow,
        QuantizeReport,
        quantize_model,
        restore_model,
    )

# Flax is imported when one of these is first used.
_NNX = ("QuantizeReport", "QuantizedRow", "quantize_model", "restore_model")

__all__ = [
    # Derivatives in a few bits
    "Codebook",
    "codebook",
    "few_bit",
    # The nonlinearities of jax.nn
    "celu",
    "elu",
    "gelu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "leaky_relu",
    "log_sigmoid",
    "mish",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softplus",
    "squareplus",
    "swish",
    "tanh",
    # Gated nonlinearities
    "gated",
    "geglu",
    "swiglu",
    # What a block saves, by name
    "Policy",
    "policy",
    # In a whole function or model; in Linen `linen`
    "CallsReport",
    "CallsRow",
    "FewBitCalls",
    "QuantizeReport",
    "QuantizedRow",
    "few_bit_calls",
    "linen",
    "quantize_model",
    "restore_model",
]


def __getattr__(name: str) -> Any:
    if name == "linen":
        return import_module("lowrank_optax.activations.linen")
    if name in _NNX:
        return getattr(import_module("lowrank_optax.activations.replacing"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
