"""APOLLO: the gradient itself, scaled as Adam scales a random projection of it."""

from collections.abc import Callable
from typing import Any

import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.projection import residuals
from lowrank_optax.projection.recipes.assembly import chosen_subspace, projected_optimizer
from lowrank_optax.projection.subspaces import Subspace, random
from lowrank_optax.projection.view import RankSpec, Side
from lowrank_optax.quantization import Bits
from lowrank_optax.states.assemble import DecayPlacement, EpsPlacement


@explains_names
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankSpec | None = None,
    refresh_every: int | None = 200,
    scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    gamma: float = 1.01,
    *,
    granularity: residuals.Granularity = "channel",
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
    r"""APOLLO: learning rates of columns, estimated in a random subspace that a seed describes.

    With a Gaussian :math:`P`, drawn again every ``refresh_every`` steps, :math:`R = P^\top G` and
    :math:`N = \mathrm{Adam}(R)`, the update is

    .. math::
      \sqrt{\alpha} \; G \, \mathrm{diag}(\lVert N_j \rVert / \lVert R_j \rVert),

    and the growth of its norm is limited to ``gamma`` per step. For a weight ``[m, n]`` the state
    is ``2·r·n + 1`` floats (``m <= n``), and one seed for all. Other leaves get plain Adam. Moments
    are not rotated, as in the official code. Arguments not listed here are those of `galore`.

    Args:
      learning_rate: Float or optax schedule; 0.01 in the paper's pre-training.
      rank: Size of the projection: see `galore`; None for a quarter of the smaller side.
      refresh_every: Steps from one random basis to the next.
      scale: Factor :math:`\alpha`, whose root is applied (official code): 1; in fine-tuning the
        width over the rank.
      gamma: Largest growth of the update's norm from step to step.
      granularity: ``"channel"``, a factor for each column, or ``"tensor"``, one for each matrix.
      inner: See `galore`; the limiter then sees the norms that are applied.
      subspace: Subspace rule instead of ``subspaces.random(rank)``.
      seed: Seed of the random bases.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.apollo(0.01).init({"kernel": jnp.zeros((16, 64))})[0]
      >>> state.basis.shape, state.inner.mu["kernel"].shape
      ((), (4, 64))

    Reference:
      Zhu et al., APOLLO: SGD-like Memory, AdamW-level Performance, 2024,
      https://arxiv.org/abs/2412.05270, Algorithm 1.
    """
    if isinstance(scale, int | float) and scale <= 0:
        raise ValueError(f"scale={scale!r} must be a positive number.")
    decays = (b1, b2) if inner is None else None
    return projected_optimizer(
        apollo,
        learning_rate,
        chosen_subspace(subspace, rank, 0.25, random),
        inner,
        {"b1": b1, "b2": b2, "eps": eps, "eps_placement": eps_placement},
        {
            "weight_decay": weight_decay,
            "weight_decay_mask": weight_decay_mask,
            "decay_placement": decay_placement,
        },
        state_bits,
        residual=residuals.gradient_scaling(gamma, decays, granularity),
        refresh_every=refresh_every,
        scale=scale**0.5,
        side=side,
        seed=seed,
        weight_dimension_numbers=weight_dimension_numbers,
    )


@explains_names
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankSpec = 1,
    refresh_every: int | None = 200,
    scale: float = 128.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    gamma: float = 1.01,
    *,
    inner: optax.GradientTransformation | None = None,
    eps_placement: EpsPlacement = "after_bias_correction",
    decay_placement: DecayPlacement = "before_step",
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    side: Side = "shorter",
    state_bits: Bits | None = None,
    seed: int = 0,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO-Mini: `apollo` of rank one, with one factor for each matrix.

    The state of a matrix is two rows. Arguments not listed here are those of `apollo`.

    Args:
      learning_rate: Float or optax schedule; 0.01 in the paper's pre-training.
      rank: Size of the projection.
      scale: Factor :math:`\alpha`, whose root is applied: 128 in the paper.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.apollo_mini(0.01).init({"kernel": jnp.zeros((16, 64))})[0]
      >>> state.inner.mu["kernel"].shape
      (1, 64)

    Reference:
      Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270, section 4.2.
    """
    return apollo(
        learning_rate,
        rank,
        refresh_every,
        scale,
        b1,
        b2,
        eps,
        weight_decay,
        gamma,
        granularity="tensor",
        inner=inner,
        eps_placement=eps_placement,
        decay_placement=decay_placement,
        weight_decay_mask=weight_decay_mask,
        side=side,
        state_bits=state_bits,
        seed=seed,
        weight_dimension_numbers=weight_dimension_numbers,
    )
