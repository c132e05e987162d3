"""Mirror Sinkhorn: online minimisation over couplings, matrices with given row and column sums."""

from lowrank_optax.optimizers.mirror_sinkhorn.logits import (
    MirrorSinkhornUpdatesState,
    coupling_from_logits,
    mirror_sinkhorn_updates,
)
from lowrank_optax.optimizers.mirror_sinkhorn.polytope import (
    SlackProblem,
    round_to_polytope,
    with_slack,
)
from lowrank_optax.optimizers.mirror_sinkhorn.solver import (
    MirrorSinkhorn,
    MirrorSinkhornState,
    minimize_over_couplings,
    mirror_sinkhorn,
)
from lowrank_optax.optimizers.mirror_sinkhorn.transport import Transport, optimal_transport

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
]
