"""DCT-AdamW: AdamW on the cosines on which most of each gradient lies."""

from collections.abc import Callable
from typing import Any, Literal

import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.projection import residuals
from lowrank_optax.projection.inner_moments import OnRefresh
from lowrank_optax.projection.recipes.assembly import projected_optimizer
from lowrank_optax.projection.refresh import RefreshRule
from lowrank_optax.projection.subspaces import dct
from lowrank_optax.projection.view import RankSpec, Side
from lowrank_optax.quantization import Bits
from lowrank_optax.states.assemble import DecayPlacement, EpsPlacement


@explains_names
def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankSpec = 128,
    refresh_every: int | RefreshRule | None = 1,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    error_feedback: Literal[32, 8] | None = None,
    order: int = 1,
    transform: Literal["products", "fft"] = "products",
    inner: optax.GradientTransformation | None = None,
    eps_placement: EpsPlacement = "after_bias_correction",
    decay_placement: DecayPlacement = "before_step",
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    on_refresh: OnRefresh = "rotate_moments",
    side: Side = "shorter",
    state_bits: Bits | None = None,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    r"""DCT-AdamW: the basis is ``rank`` columns of one cosine matrix, chosen at every step.

    With the indices :math:`I` of the largest rows of :math:`B^\top G`, :math:`P = B_{:, I}`, and
    the update is :math:`P \, \mathrm{Adam}(P^\top G)`. Indices that stay keep their moments,
    new ones start with zeros (``"rotate_moments"``, here a permutation). For a weight ``[m, n]``
    the state is ``r`` integers and ``2·r·n`` floats (``m <= n``); error feedback adds ``m·n``
    floats, or bytes. Other leaves get plain AdamW. Arguments not listed here are those of `galore`.

    Args:
      refresh_every: Steps from one choice to the next: see `galore`.
      b2: Decay of the second moment, which new indices start without: their first steps are up to
        ``(1 - b1) / sqrt(1 - b2)`` times as large, 3.2 for these defaults (the code's), 1.0 for
        0.99.
      error_feedback: Bits of the residual that is added to the next gradient, 32 or 8; or None.
      order: Norm of the scores, 1 (the code) or 2.
      transform: ``"products"`` or ``"fft"``, to compute coefficients: see `subspaces.dct`.
      on_refresh: See `scale_by_projection`. ``"keep"`` is the code's default, by which indices
        inherit moments of others.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.dct_adamw(0.01, rank=2)
      >>> rows = [[1, 2, 3, 4], [4, 3, 2, 1], [1, 1, 1, 1], [0, 1, 0, 1], [2, 2, 0, 0]]
      >>> gradient = {"kernel": jnp.array(rows, jnp.float32)}
      >>> _, state = tx.update(gradient, tx.init(gradient))
      >>> state[0].basis["kernel"].tolist()
      [0, 1]

    Reference:
      Modoranu et al., SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models,
      2025, https://arxiv.org/abs/2505.17967, Algorithm 1.
    """
    return projected_optimizer(
        dct_adamw,
        learning_rate,
        dct(rank, order, transform),
        inner,
        {"b1": b1, "b2": b2, "eps": eps, "eps_placement": eps_placement},
        {
            "weight_decay": weight_decay,
            "weight_decay_mask": weight_decay_mask,
            "decay_placement": decay_placement,
        },
        state_bits,
        residual="drop" if error_feedback is None else residuals.error_feedback(error_feedback),
        on_refresh=on_refresh,
        refresh_every=refresh_every,
        side=side,
        weight_dimension_numbers=weight_dimension_numbers,
    )
