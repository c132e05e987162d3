"""Fira: GaLore, and the residual of the gradient scaled column by column."""

from collections.abc import Callable
from typing import Any, Literal

import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.projection import residuals
from lowrank_optax.projection.inner_moments import OnRefresh
from lowrank_optax.projection.recipes.assembly import chosen_subspace, projected_optimizer
from lowrank_optax.projection.refresh import RefreshRule
from lowrank_optax.projection.subspaces import Subspace, randomized_svd
from lowrank_optax.projection.view import RankSpec, Side
from lowrank_optax.quantization import Bits
from lowrank_optax.states.assemble import DecayPlacement, EpsPlacement


@explains_names
def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankSpec | None = None,
    refresh_every: int | RefreshRule | None = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    gamma: float = 1.01,
    *,
    residual_form: Literal["code", "paper"] = "code",
    inner: optax.GradientTransformation | None = None,
    eps_placement: EpsPlacement = "after_bias_correction",
    decay_placement: DecayPlacement = "before_step",
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    subspace: Subspace | None = None,
    on_refresh: OnRefresh = "keep",
    side: Side = "shorter",
    state_bits: Bits | None = None,
    seed: int = 0,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Fira: GaLore, and the residual of the gradient, each column scaled as Adam scaled it.

    With :math:`R = P^\top G`, :math:`N = \mathrm{Adam}(R)` and
    :math:`\phi_j = \lVert N_j \rVert / \lVert R_j \rVert` for each column, the update is (official
    code)

    .. math::
      \alpha P N + (G - \alpha P R) \, \mathrm{diag}(\phi),

    and the growth of the second term's norm is limited to ``gamma`` per step. The paper's form has
    :math:`\alpha` before both terms and :math:`G - P R`. The state is GaLore's and one float per
    matrix. Other leaves get plain Adam. Arguments not listed here are those of `galore`.

    Args:
      learning_rate: Float or optax schedule; 0.01 in the paper's pre-training.
      scale: Factor :math:`\alpha`: 0.25 below 1B parameters, 0.0625 from there on.
      gamma: Largest growth of the residual's norm from step to step.
      residual_form: ``"code"``, which made the paper's numbers, or ``"paper"``.
      inner: See `galore`; the limiter then sees the norms that are applied.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.fira(0.01, rank=1)
      >>> gradient = {"kernel": jnp.array([[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]])}
      >>> updates, _ = tx.update(gradient, tx.init(gradient))
      >>> print(abs(updates["kernel"]).round(4))
      [[0.0096 0.0089 0.    ]
       [0.0032 0.0045 0.022 ]]

    Reference:
      Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?, 2024,
      https://arxiv.org/abs/2410.01623, Algorithm 1.
    """
    decays = (b1, b2) if residual_form == "code" and inner is None else None
    return projected_optimizer(
        fira,
        learning_rate,
        chosen_subspace(subspace, rank, 128, randomized_svd),
        inner,
        {"b1": b1, "b2": b2, "eps": eps, "eps_placement": eps_placement},
        {
            "weight_decay": weight_decay,
            "weight_decay_mask": weight_decay_mask,
            "decay_placement": decay_placement,
        },
        state_bits,
        residual=residuals.fira(gamma, residual_form, decays),
        on_refresh=on_refresh,
        refresh_every=refresh_every,
        scale=scale,
        side=side,
        seed=seed,
        weight_dimension_numbers=weight_dimension_numbers,
    )
