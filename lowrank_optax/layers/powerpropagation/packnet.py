"""EfficientPackNet: one network for a sequence of tasks, each of which owns some of the weights.

Each task trains the weights that no earlier task owns, keeps as few of them as its score allows,
and leaves the others to later tasks. The weights of a task, and its outputs, never change again.
"""

import bisect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.powerpropagation.pruning import apply_masks, by_layer, largest
from lowrank_optax.layers.powerpropagation.reparameterisation import (
    Where,
    layer_matrices,
    selected,
)

__all__ = ["LEVELS", "PackNetState", "Pruned", "free_masks", "init", "of_task", "prune", "redraw"]

LEVELS = tuple(np.geomspace(0.01, 1.0, 20).tolist())
"""Shares of the free weights that `prune` tries: the grid of the official notebook."""


class PackNetState(NamedTuple):
    """The owner of each weight.

    Attributes:
      task: Number of finished tasks, int32.
      owner: Tree like the parameters of uint8, one byte per weight: the task (from 1) that owns the
        weight, 0 for a free one.
    """

    task: jax.Array
    owner: Any


class Pruned(NamedTuple):
    """Result of `prune`.

    Attributes:
      state: State with the task's weights frozen.
      keep: Share of the free weights that the task keeps.
      score: Score with these.
      dense_score: Score with all weights.
    """

    state: PackNetState
    keep: float
    score: float
    dense_score: float


def init(params: Any) -> PackNetState:
    """Return the state before the first task: all weights are free.

    Args:
      params: Tree of the arrays that tasks share; heads of single tasks are not among them.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.layers.packnet.init({"kernel": jnp.ones((1, 2))})
      >>> print(state.task, state.owner["kernel"].tolist())
      0 [[0, 0]]
    """
    owner = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.uint8), params)
    return PackNetState(jnp.zeros([], jnp.int32), owner)


def free_masks(state: PackNetState) -> Any:
    """Return masks of the free weights, a tree of bool arrays: those to train, by `mask_updates`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.layers.packnet.init({"kernel": jnp.ones((1, 2))})
      >>> print(lro.layers.packnet.free_masks(state)["kernel"].tolist())
      [[True, True]]
    """
    return jax.tree.map(lambda owner: owner == 0, state.owner)


def redraw(state: PackNetState, params: Any, fresh: Any) -> Any:
    """Return the parameters with the free weights replaced by new ones, when a task begins.

    Args:
      state: State before the task.
      params: Tree of the parameters.
      fresh: Tree like it of new values without zeros, which would not train; if the parameters are
        those of `powerprop`, from `powerprop_inverse`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params, fresh = {"kernel": jnp.zeros((1, 2))}, {"kernel": jnp.ones((1, 2))}
      >>> state = lro.layers.packnet.init(params)
      >>> print(lro.layers.packnet.redraw(state, params, fresh)["kernel"].tolist())
      [[1.0, 1.0]]
    """
    pick = lambda owner, x, new: jnp.where(owner == 0, new, x)
    return jax.tree.map(pick, state.owner, params, fresh)


def of_task(state: PackNetState, params: Any, task: int | jax.Array) -> Any:
    """Return the parameters of a task: its weights and those of earlier tasks, zeros elsewhere.

    Args:
      state: State at any time after the task.
      params: Parameters at that time.
      task: Number of the task, from 1.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.array([[1.0, 2.0, 3.0]])}
      >>> owner = {"kernel": jnp.array([[0, 1, 2]], jnp.uint8)}
      >>> state = lro.layers.packnet.PackNetState(jnp.array(2), owner)
      >>> print(lro.layers.packnet.of_task(state, params, 1)["kernel"].tolist())
      [[0.0, 2.0, 0.0]]
    """
    masks = jax.tree.map(lambda owner: (owner > 0) & (owner <= task), state.owner)
    return apply_masks(params, masks)


def prune(
    state: PackNetState,
    params: Any,
    score: Callable[[Any], Any],
    tolerance: float = 0.99,
    levels: Sequence[float] = LEVELS,
    where: Where = None,
) -> Pruned:
    """End a task: freeze as few of its weights as its score allows, and free the others.

    The largest free weights of each layer are kept, by the smallest share with ``score >=
    tolerance * dense_score``. The share is found by bisection, so ``score`` is called about
    ``log2(len(levels))`` times, without training in between. Leaves outside ``where``, such as
    biases and norms, belong to the first task as a whole, since its outputs must not change.

    Call it outside of ``jit``.

    Args:
      state: State before the task.
      params: Parameters after training the task.
      score: Function from such parameters to a positive number, better if larger, such as the
        accuracy on validation data.
      tolerance: Share of the dense score to reach, in (0, 1].
      levels: Shares of the free weights to try, ascending, in (0, 1].
      where: Leaves to prune, as for `powerprop`.

    Returns:
      The new state, the share kept and both scores.

    Raises:
      ValueError: If ``tolerance`` or ``levels`` are out of range, the dense score is not positive,
        or 255 tasks are finished.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.array([[0.1, 4.0, -5.0, 0.2]])}
      >>> state = lro.layers.packnet.init(params)
      >>> score = lambda params: jnp.abs(params["kernel"]).sum()
      >>> done = lro.layers.packnet.prune(state, params, score, 0.9, levels=(0.25, 0.5, 1.0))
      >>> print(done.keep, done.state.owner["kernel"].tolist())
      0.5 [[0, 1, 1, 0]]

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296, section 4.
    """
    if not 0 < tolerance <= 1:
        raise ValueError(f"tolerance={tolerance!r} must be in (0, 1].")
    ascending = all(a < b for a, b in pairwise(levels))
    if not levels or not ascending or not 0 < levels[0] <= levels[-1] <= 1:
        raise ValueError(f"levels={tuple(levels)!r} must be ascending shares in (0, 1].")
    task = int(state.task) + 1
    if task > 255:
        raise ValueError("255 tasks are done, and an owner is stored in a byte.")
    dense_score = float(score(params))
    if not dense_score > 0:
        raise ValueError(
            f"the score with all weights is {dense_score:g}; it must be a positive number."
        )
    # The owners are not stored: at the end they are computed again, from the share.
    owned = lambda share: _owned(state, params, share, where)
    scores = {1.0: dense_score}  # if no share is enough, as the dense network does

    def is_enough(share: float) -> bool:
        scores[share] = float(score(of_task(owned(share), params, task)))
        return scores[share] >= tolerance * dense_score

    keep = (*levels, 1.0)[bisect.bisect_left(levels, True, key=is_enough)]
    return Pruned(owned(keep), keep, scores[keep], dense_score)


@jax.jit
def _mask_of_largest(x: jax.Array, free: jax.Array, keep: jax.Array) -> jax.Array:
    """Masks of the share ``keep`` of the free weights of each layer, ``[layers, n]``."""
    number = jnp.sum(free, axis=-1)
    count = jnp.maximum(1, jnp.floor(keep * number + 1e-3).astype(int))
    return largest(jnp.where(free, jnp.abs(x), -1), count) & free


def _owned(state: PackNetState, params: Any, keep: float, where: Where) -> PackNetState:
    """The state after the next task, if it keeps this share of the free weights."""
    task = state.task + 1

    def owner_of(x: jax.Array, owner: jax.Array, is_chosen: bool, spec: Any) -> jax.Array:
        is_owned = owner == 0
        if is_chosen and x.size:
            mask = lambda x, free: _mask_of_largest(x, free, jnp.asarray(keep))
            is_owned = by_layer(mask, spec, x, is_owned)
        return jnp.where(is_owned, task, owner).astype(jnp.uint8)

    leaves, treedef = jax.tree.flatten(params)
    owners = treedef.flatten_up_to(state.owner)
    chosen, specs = selected(params, where), layer_matrices(params)
    return PackNetState(task, treedef.unflatten(map(owner_of, leaves, owners, chosen, specs)))
