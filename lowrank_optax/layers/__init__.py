"""Layers and reparameterised weights for memory-efficient training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank_optax.layers import comrope, maestro
from lowrank_optax.layers.attention.chunked import chunked_attention
from lowrank_optax.layers.attention.implementations import (
    AttentionImplementation,
    dot_product_attention,
)
from lowrank_optax.layers.fixed_point.formats import FixedPointFormat, Overflow, Rounding
from lowrank_optax.layers.fixed_point.integer_files import load_integers
from lowrank_optax.layers.fixed_point.integers import (
    Cast,
    IntegerArray,
    IntegerLayer,
    IntegerLayers,
)
from lowrank_optax.layers.fixed_point.quantizer import quantize_fixed_point
from lowrank_optax.layers.fixed_point.ranges import StartRule, choose_integer_bits
from lowrank_optax.layers.powerpropagation import packnet
from lowrank_optax.layers.powerpropagation.optimizer import powerprop_updates
from lowrank_optax.layers.powerpropagation.pruning import (
    MaskUpdatesState,
    apply_masks,
    magnitude_masks,
    mask_updates,
)
from lowrank_optax.layers.powerpropagation.reparameterisation import (
    change_alpha,
    powerprop,
    powerprop_inverse,
)
from lowrank_optax.layers.random_features.feature_attention import (
    decode_random_features,
    init_random_feature_state,
    random_feature_attention,
)
from lowrank_optax.layers.random_features.feature_maps import (
    FeatureKind,
    RandomFeatures,
    random_projection,
    scaled_features,
)
from lowrank_optax.layers.random_features.frozen_scores import (
    ScoreMean,
    ScoreWeights,
    fit_ridge,
    frozen_score_attention,
    frozen_score_features,
    infinite_head_kernel,
    score_matrices,
)
from lowrank_optax.layers.random_features.linear_attention import (
    FeatureMap,
    LinearAttentionState,
    causal_linear_attention,
    full_linear_attention,
)
from lowrank_optax.layers.randomized.linear import randomized_linear
from lowrank_optax.layers.randomized.sketch import Sketch
from lowrank_optax.layers.randomized.variances import (
    alignment,
    choose_sketch_size,
    minibatch_variance,
    sketch_variance,
)
from lowrank_optax.layers.structured.base import Structure, structured_linear
from lowrank_optax.layers.structured.factors import Factors
from lowrank_optax.layers.structured.structures import BlockDense, BlockShuffle, LowRank
from lowrank_optax.layers.widenet.expert_routing import (
    Experts,
    Routing,
    expert_capacity,
    route_to_experts,
)
from lowrank_optax.layers.widenet.mixture import (
    Dispatch,
    ExpertFunction,
    RoutingStatistics,
    grouped_linear,
    mixture_of_experts,
)

if TYPE_CHECKING:
    from lowrank_optax.layers import linen
    from lowrank_optax.layers.comrope.comrope_layer import ComRoPE
    from lowrank_optax.layers.fixed_point.calibrate import (
        Calibration,
        calibrate_fixed_point,
        freeze_binary_points,
    )
    from lowrank_optax.layers.fixed_point.convert import (
        FixedPointLayer,
        FixedPointSummary,
        convert_to_fixed_point,
        fixed_point_layers,
    )
    from lowrank_optax.layers.fixed_point.export import save_integers, to_integers
    from lowrank_optax.layers.fixed_point.quantized_layers import (
        BinaryPoint,
        FixedPointConv,
        FixedPointLinear,
        FixedPointNorm,
        FixedPointQuantizer,
        FixedPointSum,
        FrozenBinaryPoint,
        LayerFormats,
    )
    from lowrank_optax.layers.maestro.maestro_layers import MaestroConv, MaestroLinear
    from lowrank_optax.layers.powerpropagation.nnx_layers import PowerpropLinear, PowerpropModule
    from lowrank_optax.layers.random_features.random_feature_layers import (
        FrozenScoreAttention,
        RandomFeatureAttention,
    )
    from lowrank_optax.layers.randomized.noise import SketchNoise, choose_sketches, sketch_noise
    from lowrank_optax.layers.randomized.randomize import (
        RandomizedLinear,
        randomize,
        randomized_layers,
        restore_linears,
    )
    from lowrank_optax.layers.structured.converting import (
        keep_merged,
        merge_structured,
        structure_linears,
        structured_layers,
    )
    from lowrank_optax.layers.structured.feed_forward_layers import StructuredFFN, StructuredLinear
    from lowrank_optax.layers.structured.guiding import (
        drop_guides,
        self_guided_schedule,
        set_guide_weight,
    )
    from lowrank_optax.layers.widenet.expert_layers import (
        ExpertFFN,
        MixtureOfExperts,
        call_expert_linear,
        expert_linear,
    )
    from lowrank_optax.layers.widenet.widenet_block import WideNetBlock

# These need Flax, which is imported when one of them is first used.
_FLAX = {
    "comrope.comrope_layer": ["ComRoPE"],
    "fixed_point.calibrate": ["Calibration", "calibrate_fixed_point", "freeze_binary_points"],
    "fixed_point.convert": [
        "FixedPointLayer",
        "FixedPointSummary",
        "convert_to_fixed_point",
        "fixed_point_layers",
    ],
    "fixed_point.export": ["save_integers", "to_integers"],
    "fixed_point.quantized_layers": [
        "BinaryPoint",
        "FixedPointConv",
        "FixedPointLinear",
        "FixedPointNorm",
        "FixedPointQuantizer",
        "FixedPointSum",
        "FrozenBinaryPoint",
        "LayerFormats",
    ],
    "maestro.maestro_layers": ["MaestroConv", "MaestroLinear"],
    "powerpropagation.nnx_layers": ["PowerpropLinear", "PowerpropModule"],
    "random_features.random_feature_layers": ["FrozenScoreAttention", "RandomFeatureAttention"],
    "randomized.noise": ["SketchNoise", "choose_sketches", "sketch_noise"],
    "randomized.randomize": [
        "RandomizedLinear",
        "randomize",
        "randomized_layers",
        "restore_linears",
    ],
    "structured.converting": [
        "keep_merged",
        "merge_structured",
        "structure_linears",
        "structured_layers",
    ],
    "structured.guiding": ["drop_guides", "self_guided_schedule", "set_guide_weight"],
    "structured.feed_forward_layers": ["StructuredFFN", "StructuredLinear"],
    "widenet.expert_layers": [
        "ExpertFFN",
        "MixtureOfExperts",
        "call_expert_linear",
        "expert_linear",
    ],
    "widenet.widenet_block": ["WideNetBlock"],
}

__all__ = [
    # Attention
    "AttentionImplementation",
    "chunked_attention",
    "dot_product_attention",
    # ComRoPE
    "ComRoPE",
    "comrope",
    # Fixed point
    "BinaryPoint",
    "Calibration",
    "Cast",
    "FixedPointConv",
    "FixedPointFormat",
    "FixedPointLayer",
    "FixedPointLinear",
    "FixedPointNorm",
    "FixedPointQuantizer",
    "FixedPointSum",
    "FixedPointSummary",
    "FrozenBinaryPoint",
    "IntegerArray",
    "IntegerLayer",
    "IntegerLayers",
    "LayerFormats",
    "Overflow",
    "Rounding",
    "StartRule",
    "calibrate_fixed_point",
    "choose_integer_bits",
    "convert_to_fixed_point",
    "fixed_point_layers",
    "freeze_binary_points",
    "load_integers",
    "quantize_fixed_point",
    "save_integers",
    "to_integers",
    # Maestro
    "MaestroConv",
    "MaestroLinear",
    "maestro",
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
    # Random-feature attention
    "FeatureKind",
    "FeatureMap",
    "FrozenScoreAttention",
    "LinearAttentionState",
    "RandomFeatureAttention",
    "RandomFeatures",
    "ScoreMean",
    "ScoreWeights",
    "causal_linear_attention",
    "decode_random_features",
    "fit_ridge",
    "frozen_score_attention",
    "frozen_score_features",
    "full_linear_attention",
    "infinite_head_kernel",
    "init_random_feature_state",
    "random_feature_attention",
    "random_projection",
    "scaled_features",
    "score_matrices",
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
    # Structured feed-forward
    "BlockDense",
    "BlockShuffle",
    "Factors",
    "LowRank",
    "Structure",
    "StructuredFFN",
    "StructuredLinear",
    "drop_guides",
    "keep_merged",
    "merge_structured",
    "self_guided_schedule",
    "set_guide_weight",
    "structure_linears",
    "structured_layers",
    "structured_linear",
    # WideNet and mixtures of experts
    "Dispatch",
    "ExpertFFN",
    "ExpertFunction",
    "Experts",
    "MixtureOfExperts",
    "Routing",
    "RoutingStatistics",
    "WideNetBlock",
    "call_expert_linear",
    "expert_capacity",
    "expert_linear",
    "grouped_linear",
    "mixture_of_experts",
    "route_to_experts",
    # The layers in Linen
    "linen",
]


def __getattr__(name: str) -> Any:
    if name == "linen":
        return import_module(f"{__name__}.linen")
    for module, names in _FLAX.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
