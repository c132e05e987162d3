"""What the methods are in PEFT: forms of their own, or plain LoRA."""

from typing import Any

from lowrank_optax.adapters.base import Adapter
from lowrank_optax.adapters.methods.dora import DoRA
from lowrank_optax.adapters.methods.lora import LoRA
from lowrank_optax.adapters.methods.lora_fa import LoRAFA
from lowrank_optax.adapters.methods.pissa import PiSSA
from lowrank_optax.adapters.peft.config import PeftConfig


def peft_form(method: Adapter, as_lora: bool | None) -> dict[str, Any] | None:
    """The fields of adapter_config.json that make PEFT compute the method from its own ``A, B``.

    Args:
      method: The method.
      as_lora: Whether it is to be a plain LoRA whose scale is folded into its factors; None for
        what is safest: those that PEFT has, and that need nothing but the base model, are not.

    Returns:
      The fields, or None where the method is converted.

    Raises:
      TypeError: If ``as_lora`` is False of a method that PEFT does not have.
      ValueError: If it is False of a PiSSA whose residual PEFT could not compute.
    """
    if as_lora:
        return None
    if type(method) in (LoRA, LoRAFA, DoRA):
        return {
            "use_rslora": method.rank_stabilized,  # type: ignore[attr-defined]
            "use_dora": isinstance(method, DoRA),
            "init_lora_weights": True,
        }
    if as_lora is None:
        return None
    if type(method) is not PiSSA:
        raise TypeError(
            f"as_lora=False: PEFT has no {type(method).__name__}; leave it out for a plain LoRA."
        )
    if method.power_iterations is not None or method.nf4_rounds:
        raise ValueError(
            "as_lora=False: PEFT computes PiSSA's residual base again, by an exact decomposition "
            f"and in full precision, which is not that of {method}; leave it out for a plain LoRA."
        )
    rank_stabilized = method.rank_stabilized
    return {"use_rslora": rank_stabilized, "use_dora": False, "init_lora_weights": "pissa"}


def method_of(
    config: PeftConfig, rank: int | None = None, alpha: float | None = None
) -> LoRA | PiSSA:
    """The method that a file holds, with its general rank and alpha, or these."""
    options: dict[str, Any] = {
        "rank": config.r if rank is None else rank,
        "alpha": config.lora_alpha if alpha is None else alpha,
        "rank_stabilized": config.use_rslora,
    }
    if config.init_lora_weights == "pissa":
        return PiSSA(**options)
    return (DoRA if config.use_dora else LoRA)(dropout=config.lora_dropout, **options)
