"""GaLore: Adam in the leading singular subspace of each gradient."""

from collections.abc import Callable
from typing import Any

import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.projection.inner_moments import OnRefresh
from lowrank_optax.projection.recipes.assembly import chosen_subspace, projected_optimizer
from lowrank_optax.projection.refresh import RefreshRule
from lowrank_optax.projection.subspaces import Subspace, quantized, randomized_svd
from lowrank_optax.projection.subspaces.wrappers import BasisBits
from lowrank_optax.projection.view import RankSpec, Side
from lowrank_optax.quantization import Bits
from lowrank_optax.states.assemble import DecayPlacement, EpsPlacement


@explains_names
def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankSpec | None = None,
    refresh_every: int | RefreshRule | None = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    inner: optax.GradientTransformation | None = None,
    eps_placement: EpsPlacement = "after_bias_correction",
    decay_placement: DecayPlacement = "before_step",
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    subspace: Subspace | None = None,
    basis_bits: BasisBits | None = None,
    on_refresh: OnRefresh = "keep",
    side: Side = "shorter",
    accumulate_steps: int | None = None,
    state_bits: Bits | None = None,
    seed: int = 0,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore: Adam whose moments live in a low-rank projection of each gradient matrix.

    With the basis :math:`P` (leading singular vectors of a gradient, refreshed every
    ``refresh_every`` steps) and :math:`m \le n`,

    .. math::
      R_t = P^\top G_t, \qquad
      W_{t+1} = W_t - \eta \, (\alpha \, P \, \mathrm{Adam}(R_t) + \lambda W_t).

    For a weight ``[m, n]`` the state is ``r·m + 2·r·n`` floats (``m <= n``) where Adam has
    ``2·m·n``. Other leaves (by default also embeddings and output heads) get plain Adam.

    Args:
      learning_rate: Float or optax schedule. The paper has 0.01 up to 1B parameters and 0.005 for
        7B, with ``scale=0.25``: ten times an Adam rate, since the product of both counts.
      rank: Number of directions: an int, a fraction, ``{pattern: rank}`` or a function of path and
        shape; 128 if None. The paper has a quarter to a half of the model's width.
      refresh_every: Steps from one basis to the next (50 to 1000 all work in the paper), or one of
        ``lowrank_optax.refresh``.
      scale: Factor :math:`\alpha` of the updates of projected leaves.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Constant added to the root of the second moment. The default is the official code's.
      weight_decay: Decoupled decay :math:`\lambda` of the full weights.
      inner: Optimizer in the subspace instead of Adam; leave `b1`, `b2` and `eps` out then.
      eps_placement: Whether to add `eps` after the bias correction of the second moment, as in the
        paper and in ``optax.adam``, or before, as in the official code, where it acts as
        :math:`\epsilon / \sqrt{1 - \beta_2^t}` would after.
      decay_placement: Whether the weights decay as they are before the step, as in
        ``optax.adamw``, or after it, as in the official code.
      weight_decay_mask: See ``mask`` of ``optax.adamw``.
      subspace: Subspace rule instead of ``subspaces.randomized_svd(rank)``; leave `rank` out then.
      basis_bits: Bits of a basis between refreshes, 16 (bfloat16), 8 or 4 (Q-GaLore): see
        ``subspaces.quantized``; None for float32.
      on_refresh: See `scale_by_projection`.
      side: See `scale_by_projection`.
      accumulate_steps: See `scale_by_projection`.
      state_bits: Bits of the moments between steps, 8 or 4 (see `low_bit`); None for float32.
      seed: Seed of the randomized range finder.
      weight_dimension_numbers: See `scale_by_projection`.

    Raises:
      TypeError: If `rank` is of another type.
      ValueError: If an argument is out of range, or has no effect with another one.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.galore(optax.linear_schedule(0.5, 0.0, 300), rank=2, refresh_every=50)
      >>> target = jnp.outer(jnp.arange(4.0), jnp.ones(6))
      >>> params = {"kernel": jnp.zeros((4, 6))}
      >>> loss = lambda p: jnp.sum((p["kernel"] - target) ** 2)
      >>> def step(carry, _):
      ...     params, state = carry
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return (optax.apply_updates(params, updates), state), None
      >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=300)
      >>> print(f"{loss(params):.3f}")
      0.000

    Reference:
      Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, 2024,
      https://arxiv.org/abs/2403.03507. The basis by randomized SVD: Su et al., GaLore 2, 2025,
      https://arxiv.org/abs/2504.20437.
    """
    rule = chosen_subspace(subspace, rank, 128, randomized_svd)
    return projected_optimizer(
        galore,
        learning_rate,
        rule if basis_bits is None else quantized(rule, basis_bits),
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
