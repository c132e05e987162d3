"""Maestro: layers that find their own ranks in training, by sampled prefixes of directions.

Horváth et al., Maestro: Uncovering Low-Rank Structures via Trainable Decomposition, 2024,
https://arxiv.org/abs/2308.14929. The layers are `MaestroLinear` and `MaestroConv`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank_optax.layers.maestro.ordered import group_norms, prefix_product, prox_tails
from lowrank_optax.layers.maestro.proximal import ProxState, prox
from lowrank_optax.layers.maestro.rank_sampling import SamplingMode, sample_ranks, shuffled_ranks

if TYPE_CHECKING:
    from lowrank_optax.layers.maestro.maestro_conversion import (
        MaestroRow,
        MaestroSummary,
        TruncationMethod,
        convert,
        merge,
        summary,
        truncate,
    )
    from lowrank_optax.layers.maestro.ordered_layer import Rank, SampledRank
    from lowrank_optax.layers.maestro.rank_compaction import compact
    from lowrank_optax.layers.maestro.ranks import (
        current_ranks,
        importance,
        important_ranks,
        penalty,
        set_ranks,
        shrink,
    )
    from lowrank_optax.layers.maestro.recalibration import recalibrate_batch_norm

# These need Flax, which is imported when one of them is first used.
_FLAX = {
    "rank_compaction": ["compact"],
    "maestro_conversion": [
        "MaestroRow",
        "MaestroSummary",
        "TruncationMethod",
        "convert",
        "merge",
        "summary",
        "truncate",
    ],
    "ordered_layer": ["Rank", "SampledRank"],
    "ranks": ["current_ranks", "importance", "important_ranks", "penalty", "set_ranks", "shrink"],
    "recalibration": ["recalibrate_batch_norm"],
}

__all__ = [
    "MaestroRow",
    "MaestroSummary",
    "ProxState",
    "Rank",
    "SampledRank",
    "SamplingMode",
    "TruncationMethod",
    "compact",
    "convert",
    "current_ranks",
    "group_norms",
    "importance",
    "important_ranks",
    "merge",
    "penalty",
    "prefix_product",
    "prox",
    "prox_tails",
    "recalibrate_batch_norm",
    "sample_ranks",
    "set_ranks",
    "shrink",
    "shuffled_ranks",
    "summary",
    "truncate",
]


def __getattr__(name: str) -> Any:
    for module, names in _FLAX.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
