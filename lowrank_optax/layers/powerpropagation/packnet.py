"""EfficientPackNet: one network for tasks in a row, each of which owns some of the weights.

Each task trains the weights that no earlier one owns, keeps as few of them as its score allows,
and leaves the others to later tasks. What a task owns never changes again, nor do its outputs.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.powerpropagation.pruning import (
    apply_masks,
    by_layer,
    from_layers,
    gathered,
    largest,
)
from lowrank_optax.layers.powerpropagation.where import Where, layer_matrices, selected

__all__ = ["LEVELS", "PackNetState", "Pruned", "free_masks", "init", "of_task", "prune", "redraw"]

LEVELS = tuple(np.geomspace(0.01, 1.0, 20).tolist())
"""Shares of the free weights that are tried: the grid of the official notebook."""


class PackNetState(NamedTuple):
    """Who owns which weight.

    Attributes:
      task: Number of the tasks that are done, int32.
      owner: A tree like the parameters of uint8: the task (from 1) that owns a weight, 0 for a
        free one. One byte a weight, however many tasks.
    """

    task: jax.Array
    owner: Any


class Pruned(NamedTuple):
    """What `prune` found.

    Attributes:
      state: The state with the task's weights frozen.
      keep: The share of the free weights that it keeps.
      score: Its score with these.
      dense_score: Its score with all weights.
    """

    state: PackNetState
    keep: float
    score: float
    dense_score: float


def init(params: Any) -> PackNetState:
    """The state before the first task: all weights are free.

    Args:
      params: The parameters that tasks share, a tree of arrays; the heads of tasks are not among
        them.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.layers.packnet.init({"kernel": jnp.ones((1, 2))})
      >>> print(state.task, state.owner["kernel"].tolist())
      0 [[0, 0]]

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296, section 4.
    """
    owner = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.uint8), params)
    return PackNetState(jnp.zeros([], jnp.int32), owner)


def free_masks(state: PackNetState) -> Any:
    """Masks of the weights that no task owns yet: those to train, by `mask_updates`.

    Returns:
      A tree like the parameters of bool arrays.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.layers.packnet.init({"kernel": jnp.ones((1, 2))})
      >>> print(lro.layers.packnet.free_masks(state)["kernel"].tolist())
      [[True, True]]

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296, section 4.
    """
    return jax.tree.map(lambda owner: owner == 0, state.owner)


def redraw(state: PackNetState, params: Any, fresh: Any) -> Any:
    """The parameters with free weights drawn anew, as a task begins.

    A weight of zero would not train, so ``fresh`` must not have any.

    Args:
      state: The state.
      params: The parameters.
      fresh: A tree like them of new ones: what is trained, as `powerprop_inverse` makes it, where
        the parameters are.

    Returns:
      A tree like ``params``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params, fresh = {"kernel": jnp.zeros((1, 2))}, {"kernel": jnp.ones((1, 2))}
      >>> state = lro.layers.packnet.init(params)
      >>> print(lro.layers.packnet.redraw(state, params, fresh)["kernel"].tolist())
      [[1.0, 1.0]]

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296, section 4.
    """
    pick = lambda owner, x, new: jnp.where(owner == 0, new, x)
    return jax.tree.map(pick, state.owner, params, fresh)


def of_task(state: PackNetState, params: Any, task: int | jax.Array) -> Any:
    """The parameters as a task sees them: its own and those of earlier tasks, zeros elsewhere.

    Args:
      state: The state.
      params: The parameters, at any time after the task was done.
      task: Its number, from 1.

    Returns:
      A tree like ``params``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.array([[1.0, 2.0, 3.0]])}
      >>> owner = {"kernel": jnp.array([[0, 1, 2]], jnp.uint8)}
      >>> state = lro.layers.packnet.PackNetState(jnp.array(2), owner)
      >>> print(lro.layers.packnet.of_task(state, params, 1)["kernel"].tolist())
      [[0.0, 2.0, 0.0]]

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296, section 4.
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
    """Ends a task: freezes as few of its weights as keep its score, and frees the others.

    Of the free weights of each layer the largest are kept, by the smallest share with ``score >=
    tolerance * dense_score``. It is found by bisection, so the score is called about
    ``log2(len(levels))`` times; it is not trained in between. Leaves outside ``where``, such as
    biases and norms, are the first task's, as a whole: else its outputs would change.

    Called outside of ``jit``.

    Args:
      state: The state.
      params: The parameters after training the task.
      score: A function of such parameters to a positive number, better if larger: the accuracy of
        the task on validation data.
      tolerance: The share of the dense score that must be kept, in (0, 1].
      levels: Shares of the free weights that are tried, ascending, in (0, 1].
      where: Which leaves are pruned, as for `powerprop`.

    Returns:
      The new state, the share kept, and both scores, as `Pruned`.

    Raises:
      ValueError: If ``tolerance`` or ``levels`` are not as above, the dense score is not positive,
        or 255 tasks are done.

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
    task = int(state.task) + 1
    _check(tolerance, levels, task)

    def score_of(keep: float) -> float:
        return float(score(of_task(_owned(state, params, keep, where), params, task)))

    dense = float(score(params))
    if not dense > 0:
        raise ValueError(f"the score with all weights is {dense:g}; it must be a positive number.")
    scores: dict[int, float] = {}

    def is_enough(level: int) -> bool:
        scores[level] = score_of(levels[level])
        return scores[level] >= tolerance * dense

    low, high = 0, len(levels)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    # Nothing is enough: everything is kept, as the dense network is.
    keep = levels[low] if low < len(levels) else 1.0
    found = scores.get(low, dense)
    return Pruned(_owned(state, params, keep, where), keep, found, dense)


@jax.jit
def _kept(sizes: jax.Array, free: jax.Array, keep: jax.Array) -> jax.Array:
    """Masks of the share ``keep`` of the free weights of each layer, ``[layers, n]``."""
    number = jnp.sum(free, axis=-1)
    count = jnp.maximum(1, jnp.floor(keep * number + 1e-3).astype(int))
    return largest(jnp.where(free, sizes, -1), count) & free


def _owned(state: PackNetState, params: Any, keep: float, where: Where) -> PackNetState:
    """The state after the next task, if it keeps this share of the free weights."""
    task = state.task + 1
    leaves, treedef = jax.tree.flatten(params)
    parts = zip(
        leaves,
        treedef.flatten_up_to(state.owner),
        selected(params, where),
        layer_matrices(params),
        strict=True,
    )

    def owner_of(x: jax.Array, owner: jax.Array, chosen: bool, spec: Any) -> jax.Array:
        def mask(x: jax.Array, free: jax.Array) -> jax.Array:
            kept = _kept(jnp.abs(by_layer(x, spec)), by_layer(free, spec), jnp.asarray(keep))
            return from_layers(kept, spec, x)

        free = owner == 0
        kept = gathered(mask, x, free) if chosen and x.size else free
        return jnp.where(kept, task, owner).astype(jnp.uint8)

    return PackNetState(task, treedef.unflatten([owner_of(*part) for part in parts]))


def _check(tolerance: float, levels: Sequence[float], task: int) -> None:
    if not 0 < tolerance <= 1:
        raise ValueError(f"tolerance={tolerance!r} must be in (0, 1].")
    ascending = all(a < b for a, b in pairwise(levels))
    if not levels or not ascending or not 0 < levels[0] <= levels[-1] <= 1:
        raise ValueError(f"levels={tuple(levels)!r} must be ascending shares in (0, 1].")
    if task > 255:
        raise ValueError("255 tasks are done, and an owner is stored in a byte.")
