"""AdaRankGrad: GaLore with a rank that falls, and a refresh when the gradient has converged."""

from collections.abc import Callable
from typing import Any

import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.projection.inner_moments import OnRefresh
from lowrank_optax.projection.recipes.assembly import chosen_subspace, projected_optimizer
from lowrank_optax.projection.refresh import RefreshRule, when_converged
from lowrank_optax.projection.subspaces import Subspace, adaptive_rank, randomized_svd
from lowrank_optax.projection.view import RankSpec, Side
from lowrank_optax.quantization import Bits
from lowrank_optax.states.assemble import DecayPlacement, EpsPlacement


@explains_names
def adarankgrad(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankSpec | None = None,
    refresh_every: int | RefreshRule | None = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    min_rank: int = 1,
    rank_step: int = 1,
    threshold: float = 0.2,
    monotone: bool = False,
    inner: optax.GradientTransformation | None = None,
    eps_placement: EpsPlacement = "after_bias_correction",
    decay_placement: DecayPlacement = "before_step",
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    subspace: Subspace | None = None,
    on_refresh: OnRefresh = "rotate_moments",
    side: Side = "shorter",
    accumulate_steps: int | None = None,
    state_bits: Bits | None = None,
    seed: int = 0,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaRankGrad: each matrix has the least rank that loses at most a share of its gradient.

    A refresh takes the least rank for which
    :math:`\lVert G - P P^\top G \rVert_F \le \xi \lVert G \rVert_F`, and rotates the moments,
    second ones by LDAdam's rule (the paper's ``C V`` can be negative). A basis is refreshed when
    its gradient has converged: see `refresh.when_converged`. Between steps, ``compact`` frees the
    memory of unused directions. Arguments not listed here are those of `galore`.

    Args:
      learning_rate: Float or optax schedule; GaLore's values.
      rank: Largest rank, 128 if None: see `galore`.
      refresh_every: Largest number of steps in a subspace; or one of ``lowrank_optax.refresh``.
      scale: GaLore's :math:`\alpha`.
      b2: Decay of the second moment, which new directions start without: their first steps are up
        to ``(1 - b1) / sqrt(1 - b2)`` times as large, 3.2 for these defaults, 1.0 for 0.99.
      min_rank: Least rank.
      rank_step: Distance from one rank considered to the next.
      threshold: Share :math:`\xi` of a gradient's norm that may be lost.
      monotone: Whether ranks may only fall.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.adarankgrad(0.01, rank=4)
      >>> gradient = {"kernel": jnp.diag(jnp.array([4.0, 2.0, 1.0, 0.5]))}
      >>> _, state = tx.update(gradient, tx.init(gradient))
      >>> state[0].basis.rank["kernel"].item()
      3

    Reference:
      Refael et al., AdaRankGrad: Adaptive Gradient-Rank and Moments for Memory-Efficient LLMs
      Training and Fine-Tuning, 2024, https://arxiv.org/abs/2410.17881, Algorithms 1 and 2. No
      official code was published.
    """
    if isinstance(refresh_every, int):
        refresh_every = when_converged(shortest=max(1, refresh_every // 4), longest=refresh_every)
    found = chosen_subspace(subspace, rank, 128, randomized_svd)
    return projected_optimizer(
        adarankgrad,
        learning_rate,
        adaptive_rank(found, min_rank, rank_step, threshold, monotone),
        inner,
        {"b1": b1, "b2": b2, "eps": eps, "eps_placement": eps_placement},
        {
            "weight_decay": weight_decay,
            "weight_decay_mask": weight_decay_mask,
            "decay_placement": decay_placement,
        },
        state_bits,
        on_refresh=on_refresh,
        refresh_every=refresh_every,
        scale=scale,
        side=side,
        accumulate_steps=accumulate_steps,
        seed=seed,
        weight_dimension_numbers=weight_dimension_numbers,
    )
