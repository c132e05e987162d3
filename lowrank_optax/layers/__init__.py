"""Layers and reparameterised weights that keep training small."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank_optax.layers.powerpropagation import (
    MaskUpdatesState,
    apply_masks,
    change_alpha,
    magnitude_masks,
    mask_updates,
    packnet,
    powerprop,
    powerprop_inverse,
    powerprop_updates,
)
from lowrank_optax.layers.randomized import (
    Sketch,
    alignment,
    choose_sketch_size,
    minibatch_variance,
    randomized_linear,
    sketch_variance,
)

if TYPE_CHECKING:
    from lowrank_optax.layers import linen
    from lowrank_optax.layers.powerpropagation.nnx_layers import PowerpropLinear, PowerpropModule
    from lowrank_optax.layers.randomized.noise import (
        SketchNoise,
        choose_sketches,
        sketch_noise,
    )
    from lowrank_optax.layers.randomized.randomize import (
        RandomizedLinear,
        randomize,
        randomized_layers,
        restore_linears,
    )

# The Flax parts, NNX here and Linen in `linen`: Flax is imported when one is first used.
_FLAX = {
    "PowerpropLinear": "lowrank_optax.layers.powerpropagation.nnx_layers",
    "PowerpropModule": "lowrank_optax.layers.powerpropagation.nnx_layers",
    "RandomizedLinear": "lowrank_optax.layers.randomized.randomize",
    "SketchNoise": "lowrank_optax.layers.randomized.noise",
    "choose_sketches": "lowrank_optax.layers.randomized.noise",
    "randomize": "lowrank_optax.layers.randomized.randomize",
    "randomized_layers": "lowrank_optax.layers.randomized.randomize",
    "restore_linears": "lowrank_optax.layers.randomized.randomize",
    "sketch_noise": "lowrank_optax.layers.randomized.noise",
}

__all__ = [
    # Powerpropagation
    "MaskUpdatesState",
    "PowerpropLinear",
    "PowerpropModule",
    "apply_masks",
    "change_alpha",
    "magnitude_masks",
    "mask_updates",
    "packnet",
    "powerprop",
    "powerprop_inverse",
    "powerprop_updates",
    # Randomized linears
    "RandomizedLinear",
    "Sketch",
    "SketchNoise",
    "alignment",
    "choose_sketch_size",
    "choose_sketches",
    "minibatch_variance",
    "randomize",
    "randomized_layers",
    "randomized_linear",
    "restore_linears",
    "sketch_noise",
    "sketch_variance",
    # The layers in Linen
    "linen",
]


def __getattr__(name: str) -> Any:
    if name == "linen":
        return import_module("lowrank_optax.layers.linen")
    if name in _FLAX:
        return getattr(import_module(_FLAX[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
