"""Online Subspace Descent: GaLore whose basis is trained along, without decompositions."""

from collections.abc import Callable
from typing import Any

import optax

from lowrank_optax.matrices import DimensionNumbersRule
from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.projection.recipes.assembly import projected_optimizer
from lowrank_optax.projection.subspaces import Subspace, online_pca
from lowrank_optax.projection.view import RankSpec, Side
from lowrank_optax.quantization import Bits
from lowrank_optax.states.arguments import refuse_unused
from lowrank_optax.states.assemble import DecayPlacement, EpsPlacement


@explains_names
def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankSpec = 128,
    subspace_learning_rate: optax.ScalarOrSchedule = 0.005,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    penalty: float = 0.1,
    *,
    subspace_optimizer: optax.GradientTransformation | None = None,
    initial: Subspace | None = None,
    inner: optax.GradientTransformation | None = None,
    eps_placement: EpsPlacement = "after_bias_correction",
    decay_placement: DecayPlacement = "before_step",
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    side: Side = "shorter",
    state_bits: Bits | None = None,
    seed: int = 0,
    weight_dimension_numbers: DimensionNumbersRule = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Online Subspace Descent: each basis takes one step of online PCA at every training step.

    The update is GaLore's, :math:`\alpha P \, \mathrm{Adam}(P^\top G)`; then :math:`P` takes one
    step down :math:`\lVert P P^\top A - A \rVert^2 + \lambda \lVert P^\top P - I \rVert^2` with
    :math:`A = G / \lVert G \rVert`. After the first step nothing is decomposed, and all steps cost
    the same: GaLore's two products and one more. For a weight ``[m, n]`` the state is
    ``3·r·m + 2·r·n`` floats (``m <= n``), or ``r·m + 2·r·n`` with plain gradient descent on the
    basis. Other leaves get plain Adam. Arguments not listed here are those of `galore`.

    Args:
      learning_rate: Float or optax schedule: 0.01 at 60M parameters, 0.001 at 350M and 1B.
      subspace_learning_rate: Learning rate of the basis' Adam: 1/200 in the code, which multiplies
        it by the schedule of the learning rate; to do so, give a schedule of the training step.
        Steps whose gradient is zero or not finite move no basis and are not counted.
      scale: GaLore's :math:`\alpha`.
      weight_decay: Decoupled decay of the full weights (never of the bases; the code's AdamW decays
        them by 0.01).
      penalty: Factor :math:`\lambda`; 0.1 in the paper, absent (0) in the code.
      subspace_optimizer: Optimizer of the bases instead of Adam; the paper trains 7B with
        ``optax.sgd``. It counts its own steps, from the second training step on.
      initial: Rule for the first bases: ``subspaces.fixed`` of given ones, ``subspaces.svd(rank)``
        as in the code, or ``subspaces.randomized_svd(rank)`` if None.
      seed: Seed of the first basis.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.online_subspace_descent(0.01, rank=2)
      >>> gradient = {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}
      >>> _, state = tx.update(gradient, tx.init(gradient))
      >>> _, moved = tx.update(gradient, state)
      >>> bool((state[0].basis.basis["kernel"] == moved[0].basis.basis["kernel"]).all())
      False

    Reference:
      Liang et al., Memory-Efficient LLM Training with Online Subspace Descent, 2024,
      https://arxiv.org/abs/2408.12857, Algorithm 1.
    """
    rate = subspace_learning_rate
    if subspace_optimizer is not None:
        refuse_unused(online_subspace_descent, "subspace_optimizer", subspace_learning_rate=rate)
    adam = optax.adam(_one_step_later(rate) if callable(rate) else rate)
    moves = adam if subspace_optimizer is None else subspace_optimizer
    return projected_optimizer(
        online_subspace_descent,
        learning_rate,
        online_pca(rank, moves, penalty, initial),
        inner,
        {"b1": b1, "b2": b2, "eps": eps, "eps_placement": eps_placement},
        {
            "weight_decay": weight_decay,
            "weight_decay_mask": weight_decay_mask,
            "decay_placement": decay_placement,
        },
        state_bits,
        refresh_every=None,
        scale=scale,
        side=side,
        seed=seed,
        weight_dimension_numbers=weight_dimension_numbers,
    )


def _one_step_later(schedule: optax.Schedule) -> optax.Schedule:
    """The schedule for a count that starts at the second step, the first to move a basis."""
    return lambda count: schedule(count + 1)
