"""Optimizers that work on full gradients, and rules for any optimizer."""

from lowrank_optax.optimizers.adagrad_norm import (
    ScaleByAdagradNormState,
    adagrad_norm,
    scale_by_adagrad_norm,
)
from lowrank_optax.optimizers.extrapolate import (
    ExtrapolateState,
    extrapolate,
    extrapolation_eval_params,
)
from lowrank_optax.optimizers.extrapolation import (
    ExtrapolatedValueAndGrad,
    ExtrapolationState,
    extrapolated_value_and_grad,
)
from lowrank_optax.optimizers.gradient_direction import with_gradient_direction
from lowrank_optax.optimizers.grams import cautious_adamw, grams
from lowrank_optax.optimizers.mirror_sinkhorn.logits import (
    MirrorSinkhornUpdatesState,
    coupling_from_logits,
    mirror_sinkhorn_updates,
)
from lowrank_optax.optimizers.mirror_sinkhorn.polytope import round_to_polytope
from lowrank_optax.optimizers.mirror_sinkhorn.solver import (
    MirrorSinkhorn,
    MirrorSinkhornState,
    minimize_over_couplings,
    mirror_sinkhorn,
)
from lowrank_optax.optimizers.mirror_sinkhorn.transport import (
    SlackProblem,
    Transport,
    optimal_transport,
    with_slack,
)
from lowrank_optax.optimizers.nag_gs import ScaleByNagGsState, nag_gs, scale_by_nag_gs
from lowrank_optax.optimizers.nag_gs_quadratic import (
    HeavyBall,
    NagGsQuadratic,
    nag_gs_quadratic,
    nag_gs_stationary_variance,
    to_heavy_ball,
)

__all__ = [
    "MirrorSinkhorn",
    "MirrorSinkhornState",
    "MirrorSinkhornUpdatesState",
    "SlackProblem",
    "Transport",
    "coupling_from_logits",
    "minimize_over_couplings",
    "mirror_sinkhorn",
    "mirror_sinkhorn_updates",
    "optimal_transport",
    "round_to_polytope",
    "with_slack",
    "ExtrapolateState",
    "ExtrapolatedValueAndGrad",
    "ExtrapolationState",
    "HeavyBall",
    "NagGsQuadratic",
    "ScaleByAdagradNormState",
    "ScaleByNagGsState",
    "adagrad_norm",
    "cautious_adamw",
    "extrapolate",
    "extrapolated_value_and_grad",
    "extrapolation_eval_params",
    "grams",
    "nag_gs",
    "nag_gs_quadratic",
    "nag_gs_stationary_variance",
    "scale_by_adagrad_norm",
    "scale_by_nag_gs",
    "to_heavy_ball",
    "with_gradient_direction",
]
