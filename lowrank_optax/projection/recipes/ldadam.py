"""LDAdam: Adam in a subspace that follows gradient and momentum at every step."""

from collections.abc import Callable
from typing import Any, Literal

import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.projection import residuals
from lowrank_optax.projection.recipes.assembly import chosen_subspace, projected_optimizer
from lowrank_optax.projection.refresh import RefreshRule
from lowrank_optax.projection.subspaces import Subspace, power_iteration, randomized_svd
from lowrank_optax.projection.view import RankSpec, Side
from lowrank_optax.quantization import Bits
from lowrank_optax.states.arguments import refuse_unused
from lowrank_optax.states.assemble import DecayPlacement, EpsPlacement


@explains_names
def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankSpec | None = None,
    refresh_every: int | RefreshRule | None = 1,
    b1: float = 0.908,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    rho: float = 0.908,
    *,
    error_feedback: Literal[32, 8] | None = 32,
    inner: optax.GradientTransformation | None = None,
    eps_placement: EpsPlacement = "after_bias_correction",
    decay_placement: DecayPlacement = "before_step",
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    subspace: Subspace | None = None,
    side: Side = "shorter",
    state_bits: Bits | None = None,
    seed: int = 0,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LDAdam: one warm power iteration per step, rotated moments, and error feedback.

    With :math:`A = G + E` and :math:`B = \rho P_{t-1} \hat M + (1 - \rho) A`,

    .. math::
      P_t = \mathrm{orth}(B B^\top P_{t-1}), \quad R = P_t^\top A, \quad
      E \leftarrow A - P_t R + \tfrac{b_1}{1 - b_1} (P_{t-1} M - P_t C M),

    with :math:`C = P_t^\top P_{t-1}`, and the update is :math:`P_t \, \mathrm{Adam}(R)` with
    moments rotated from the last subspace. The error has the size of the weight: with 32 bits the
    state is no smaller than Adam's (the official code saves it in the gradient's buffer); with 8
    bits or None it is. Other leaves get plain AdamW. Arguments not listed here are those of
    `galore`.

    Args:
      refresh_every: Steps from one power iteration to the next: see `galore`.
      rho: Weight :math:`\rho` of the momentum in what the subspace follows.
      error_feedback: Bits of the error, 32 or 8; None for no feedback.
      inner: See `galore`; its first moment must be a moving average of gradients, whose
        :math:`b_1` is read from it.
      subspace: Subspace rule instead of ``subspaces.power_iteration(rank, rho)``; leave `rank` and
        `rho` out then.
      seed: Seed of the first basis, by a randomized range finder (in the code, an SVD).

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.ldadam(0.01, rank=1)
      >>> gradient = {"kernel": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> _, state = tx.update(gradient, tx.init(gradient))
      >>> print(abs(jnp.diag(state[0].residual["kernel"])).round(3))  # what was not sent
      [0. 1.]

    Reference:
      Robert et al., LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics, 2024,
      https://arxiv.org/abs/2410.16103, Algorithm 1.
    """
    keeps_error = error_feedback is not None
    followed = lambda rank: power_iteration(rank, rho, initial=randomized_svd(rank))
    if subspace is not None:
        refuse_unused(ldadam, "subspace", rho=rho)
    return projected_optimizer(
        ldadam,
        learning_rate,
        chosen_subspace(subspace, rank, 128, followed),
        inner,
        {"b1": b1, "b2": b2, "eps": eps, "eps_placement": eps_placement},
        {
            "weight_decay": weight_decay,
            "weight_decay_mask": weight_decay_mask,
            "decay_placement": decay_placement,
        },
        state_bits,
        residual=residuals.error_feedback(error_feedback, momentum=True) if keeps_error else "drop",
        on_refresh="rotate_moments",
        refresh_every=refresh_every,
        side=side,
        seed=seed,
        weight_dimension_numbers=weight_dimension_numbers,
    )
