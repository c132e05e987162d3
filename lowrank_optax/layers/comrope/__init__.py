"""ComRoPE: rotary positions by trainable commuting angle matrices.

Yu et al., 2025, https://arxiv.org/abs/2506.03737. The layer is `ComRoPE`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank_optax.layers.comrope.block_exponentials import block_exponentials
from lowrank_optax.layers.comrope.commuting_rotations import (
    position_rotations,
    rope_angles,
    rotate_heads,
)
from lowrank_optax.layers.comrope.position_grids import grid_positions
from lowrank_optax.layers.comrope.rope_form import RopeForm, fold, to_rope

if TYPE_CHECKING:
    from lowrank_optax.layers.comrope.comrope_layer import ComRoPEVariant

__all__ = [
    "ComRoPEVariant",
    "RopeForm",
    "block_exponentials",
    "fold",
    "grid_positions",
    "position_rotations",
    "rope_angles",
    "rotate_heads",
    "to_rope",
]


def __getattr__(name: str) -> Any:
    if name == "ComRoPEVariant":  # needs Flax
        return import_module(f"{__name__}.comrope_layer").ComRoPEVariant
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
