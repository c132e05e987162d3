"""LaMDA's freezing: rows of the last factor are frozen one after the other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from lowrank_optax.adapters.training.rank_allocation import RankPattern, ranks_at
from lowrank_optax.matrices.paths import normalised_path
from lowrank_optax.states.arguments import transformation


class LamdaFreezingState(NamedTuple):
    """State of `lamda_freezing`.

    Attributes:
      count: Number of updates so far, int32.
      inner_state: State of the inner transformation.
    """

    count: Any
    inner_state: Any


def lamda_freezing(
    inner: optax.GradientTransformation,
    total_steps: int,
    eta: float = 0.3,
    *,
    rank_pattern: RankPattern | None = None,
    names: Sequence[str] = ("B",),
) -> optax.GradientTransformationExtraArgs:
    r"""``inner``, with rows of the leaves named ``B`` frozen in their order.

    At step :math:`t`, counted from 0, the first

    .. math::
      k(t) = \min\bigl(r, \lfloor r \, t / (\eta T) \rfloor\bigr)

    of ``r`` rows do not move: neither by gradient, momentum nor decay, since it is what ``inner``
    returns that is masked. From step :math:`\eta T` on no row moves. The rows of `LaMDA` are in the
    order of their singular values, the largest first.

    Freezing alone saves no time and no memory: from then on take ``B`` out of the trained
    parameters, and carry the optimizer's state over with `carry_state`.

    Args:
      inner: Any optax transformation, with its learning rate and weight decay.
      total_steps: Optimizer steps of the run, :math:`T`.
      eta: The fraction of them until all rows are frozen; ``inf`` for never, 0 for the start.
      rank_pattern: As it was given to `attach`, where layers have ranks of their own: ``r`` is
        then the layer's.
      names: Last names of the leaves that are frozen, ``[..., r, d_out]``.

    Returns:
      A transformation with the state `LamdaFreezingState`.

    Raises:
      ValueError: If ``total_steps`` is below 1 or ``eta`` negative; in ``update``, if
        ``rank_pattern`` has a tuple of another length than its stack.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = {"B": jnp.zeros((4, 1))}
      >>> tx = lro.adapters.lamda_freezing(optax.sgd(1.0), total_steps=100)
      >>> state = tx.init(params)
      >>> for _ in range(16):  # steps 0 to 15
      ...     updates, state = tx.update({"B": -jnp.ones((4, 1))}, state)
      >>> print(updates["B"].T)
      [[0. 0. 1. 1.]]

    Reference:
      Azizi et al., LaMDA, 2024, https://arxiv.org/abs/2406.12832.
    """
    if isinstance(total_steps, int | float) and total_steps < 1:
        raise ValueError(f"total_steps={total_steps} must be at least 1.")
    if isinstance(eta, int | float) and not eta >= 0:
        raise ValueError(f"eta={eta} must not be negative.")
    if isinstance(names, str):
        raise ValueError(f"names={names!r} must be a sequence of names, for example ('B',).")
    inner = transformation("inner", inner)

    def init_fn(params: optax.Params) -> LamdaFreezingState:
        return LamdaFreezingState(jnp.zeros([], jnp.int32), inner.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LamdaFreezingState]:
        def mask(path: Any, update: jax.Array) -> jax.Array:
            if normalised_path(path)[-1:] not in {(name,) for name in names} or update.ndim < 2:
                return update
            ranks = ranks_at(path, update.shape[:-2], update.shape[-2], rank_pattern)
            last = last_steps(ranks, update.shape[-2], eta * total_steps)
            return jnp.where((state.count < last)[..., None], update, 0)

        new, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        new = jax.tree_util.tree_map_with_path(mask, new)
        return new, LamdaFreezingState(optax.safe_increment(state.count), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def last_steps(ranks: np.ndarray, rows: int, freezing_steps: ArrayLike) -> ArrayLike:
    """The first steps ``[*batch, rows]`` at which rows are frozen; 0 beyond a matrix's own rank.

    Row ``j`` of ``ranks [*batch]`` is frozen once ``r t / freezing_steps`` has reached ``j + 1``.
    """
    share = np.minimum((np.arange(rows) + 1) / ranks[..., None], 1)
    # A product that is a whole number but for its rounding is that number.
    error = 1e-9 if isinstance(freezing_steps, float) else 5e-7
    xp = np if isinstance(freezing_steps, float) else jnp
    steps = share * freezing_steps
    return xp.where(np.arange(rows) < ranks[..., None], xp.ceil(steps * (1 - error)), 0)
