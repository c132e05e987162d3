"""Small trainable changes to frozen weights: one definition, for Flax NNX, Linen and any pytree."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank_optax.adapters.base import Adapter, AdapterParams, Merged
from lowrank_optax.adapters.compact_lora import CompactLoRA, compact_arrays
from lowrank_optax.adapters.low_rank import LowRank
from lowrank_optax.adapters.methods.aflora import AFLoRA
from lowrank_optax.adapters.methods.dora import DoRA
from lowrank_optax.adapters.methods.flylora import FlyLoRA, UnroutedLoRA
from lowrank_optax.adapters.methods.lamda import LaMDA
from lowrank_optax.adapters.methods.lora import LoRA
from lowrank_optax.adapters.methods.lora_fa import LoRAFA
from lowrank_optax.adapters.methods.lotr import LoTR
from lowrank_optax.adapters.methods.miss import MiSS, MiSSBat
from lowrank_optax.adapters.methods.pissa import PiSSA, reduction_ratio
from lowrank_optax.adapters.methods.prilora import PRILoRA
from lowrank_optax.adapters.methods.randlora import RandLoRA
from lowrank_optax.adapters.methods.sara import SaRA
from lowrank_optax.adapters.methods.sora import SoRA
from lowrank_optax.adapters.methods.svfit import SVFit, energy_rank
from lowrank_optax.adapters.methods.tucker import TuckerFactors, lotr_from_lora, lotr_from_updates
from lowrank_optax.adapters.methods.vera import VeRA
from lowrank_optax.adapters.training.aflora_freezing import (
    AfloraFreezingState,
    aflora_freezing,
    aflora_schedule,
)
from lowrank_optax.adapters.training.flylora_balance import flylora_balance
from lowrank_optax.adapters.training.gate_thresholds import (
    GateThresholdState,
    soft_threshold_gates,
)
from lowrank_optax.adapters.training.lamda_freezing import LamdaFreezingState, lamda_freezing
from lowrank_optax.adapters.training.lora_fa_projection import (
    LoRAFAProjectionState,
    lora_fa_factors,
    lora_fa_projection,
)
from lowrank_optax.adapters.training.lora_plus import lora_plus_adamw, scale_lora_plus
from lowrank_optax.adapters.training.phases import carry_state, frozen_leaves
from lowrank_optax.adapters.training.prilora_pruning import PriloraPruningState, prilora_pruning
from lowrank_optax.adapters.training.rank_allocation import (
    allocate_ranks,
    energy,
    linear_ranks,
    weight_spectra,
)
from lowrank_optax.adapters.training.sara_masks import SaraState, sara, sara_reselection

if TYPE_CHECKING:
    from lowrank_optax.adapters import linen, pytree
    from lowrank_optax.adapters.adapted_layers import (
        AdapterConstant,
        AdapterParam,
        AlsoTrained,
        trainable,
    )
    from lowrank_optax.adapters.attaching import attach, detach
    from lowrank_optax.adapters.base_checks import check_base
    from lowrank_optax.adapters.combining import merge_adapters
    from lowrank_optax.adapters.compacting import CompactReport, compact
    from lowrank_optax.adapters.merging import MergeReport, merge, unmerge
    from lowrank_optax.adapters.own_values import also_train, freeze_arrays
    from lowrank_optax.adapters.peft.config import UnsupportedConfigError
    from lowrank_optax.adapters.peft.loading import load_peft
    from lowrank_optax.adapters.peft.saving import save_peft
    from lowrank_optax.adapters.peft.weight_folding import fold_peft
    from lowrank_optax.adapters.summaries import AdapterSummary, summary
    from lowrank_optax.adapters.switching import activate, deactivate, disabled

# The Flax parts: Flax is imported when one is first used.
_FLAX = {
    "AdapterConstant": "adapted_layers",
    "AdapterParam": "adapted_layers",
    "AdapterSummary": "summaries",
    "AlsoTrained": "adapted_layers",
    "CompactReport": "compacting",
    "MergeReport": "merging",
    "UnsupportedConfigError": "peft.config",
    "activate": "switching",
    "also_train": "own_values",
    "attach": "attaching",
    "check_base": "base_checks",
    "compact": "compacting",
    "deactivate": "switching",
    "detach": "attaching",
    "disabled": "switching",
    "fold_peft": "peft.weight_folding",
    "freeze_arrays": "own_values",
    "load_peft": "peft.loading",
    "merge": "merging",
    "merge_adapters": "combining",
    "save_peft": "peft.saving",
    "summary": "summaries",
    "trainable": "adapted_layers",
    "unmerge": "merging",
}

__all__ = [
    # What an adapter is
    "Adapter",
    "AdapterParams",
    "LowRank",
    "Merged",
    # Methods
    "AFLoRA",
    "FlyLoRA",
    "LaMDA",
    "DoRA",
    "LoRA",
    "LoRAFA",
    "LoTR",
    "MiSS",
    "MiSSBat",
    "PRILoRA",
    "PiSSA",
    "RandLoRA",
    "SVFit",
    "SaRA",
    "SoRA",
    "UnroutedLoRA",
    "VeRA",
    "energy_rank",
    "reduction_ratio",
    # Updates of LoRA-FA's and LoRA's second factor
    "LoRAFAProjectionState",
    "lora_fa_factors",
    "lora_fa_projection",
    "lora_plus_adamw",
    "scale_lora_plus",
    # The balance of FlyLoRA's ranks
    "flylora_balance",
    # LoTR's factors from other methods' updates
    "TuckerFactors",
    "lotr_from_lora",
    "lotr_from_updates",
    # Freezing and pruning on the way, and ranks from spectra or depth
    "AfloraFreezingState",
    "LamdaFreezingState",
    "PriloraPruningState",
    "aflora_freezing",
    "aflora_schedule",
    "allocate_ranks",
    "carry_state",
    "energy",
    "frozen_leaves",
    "lamda_freezing",
    "linear_ranks",
    "prilora_pruning",
    "weight_spectra",
    # Selection of the entries that are trained
    "SaraState",
    "sara",
    "sara_reselection",
    # Gates that are thresholded, and ranks that are cut
    "CompactLoRA",
    "GateThresholdState",
    "compact_arrays",
    "soft_threshold_gates",
    # In a Flax NNX model
    "AdapterConstant",
    "AdapterParam",
    "AdapterSummary",
    "AlsoTrained",
    "CompactReport",
    "MergeReport",
    "activate",
    "also_train",
    "attach",
    "check_base",
    "compact",
    "deactivate",
    "detach",
    "disabled",
    "freeze_arrays",
    "merge",
    "merge_adapters",
    "summary",
    "trainable",
    "unmerge",
    # Files of Hugging Face PEFT
    "UnsupportedConfigError",
    "fold_peft",
    "load_peft",
    "save_peft",
    # In a Flax Linen model, and in any function of parameters
    "linen",
    "pytree",
]


def __getattr__(name: str) -> Any:
    if name in ("linen", "pytree"):
        return import_module(f"{__name__}.{name}")
    if name in _FLAX:
        return getattr(import_module(f"{__name__}.{_FLAX[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
