"""How much each matrix still matters to training, and which of them matter least: AFLoRA's rules.

Lists are parallel: gradients and elements' scores ``[*batch, m, n]``, and one flag or score for
each matrix, ``[*batch]``.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
import numpy as np

from lowrank_optax.matrices.explicit_sharding import constrain, partition_of

_MATRIX = (-2, -1)
_LARGEST = np.iinfo(np.int32).max


class Scores(NamedTuple):
    """Averages of gradients, float32 in their shapes; see `AfloraFreezingState`."""

    window_mean: list[jax.Array]
    sensitivity: list[jax.Array]
    uncertainty: list[jax.Array]

    def elements(self) -> list[jax.Array]:
        """Sensitivity times uncertainty."""
        return [i * u for i, u in zip(self.sensitivity, self.uncertainty, strict=True)]


def observe(
    gradients: list[jax.Array],
    scores: Scores,
    frozen: list[jax.Array],
    place: jax.Array,
    beta1: ArrayLike,
    beta2: ArrayLike,
) -> Scores:
    """The scores after another gradient, the one at ``place`` in its window; frozen ones stay."""
    sizes = [jnp.abs(g.astype(jnp.float32)) for g in gradients]
    b1, b2 = jnp.asarray(beta1, jnp.float32), jnp.asarray(beta2, jnp.float32)

    def begin(window: list[jax.Array], old_i: list[jax.Array], old_u: list[jax.Array]) -> Scores:
        i = [b1 * x + (1 - b1) * w for x, w in zip(old_i, window, strict=True)]
        apart = [jnp.abs(w - x) for x, w in zip(i, window, strict=True)]
        u = [b2 * x + (1 - b2) * y for x, y in zip(old_u, apart, strict=True)]
        return Scores([jnp.where(jnp.isfinite(g), g, 0) for g in sizes], i, u)

    def go_on(window: list[jax.Array], i: list[jax.Array], u: list[jax.Array]) -> Scores:
        mean = lambda w, g: jnp.where(jnp.isfinite(g), w + (g - w) / (place + 1), w)
        return Scores([mean(w, g) for w, g in zip(window, sizes, strict=True)], i, u)

    new = jax.lax.cond(place == 0, begin, go_on, *scores)
    keep = lambda flag, old, now: jnp.where(over(flag, old), old, now)
    return Scores(
        *(list(map(keep, frozen, old, now)) for old, now in zip(scores, new, strict=True))
    )


def below_quantile(scores: Scores, frozen: list[jax.Array], rho: jax.Array) -> list[jax.Array]:
    """The matrices whose mean score is below the ``1 - rho`` quantile of elements not frozen."""
    elements = scores.elements()
    left = [
        jnp.sum(~flag) * math.prod(x.shape[-2:]) for flag, x in zip(frozen, elements, strict=True)
    ]
    rank = jnp.floor(sum(left) * (1 - rho)).astype(jnp.int32)
    threshold = kth_smallest(elements, frozen, rank)
    return [matrix_scores(x) < threshold for x in elements]


def lowest_ranked(
    scores: Scores, frozen: list[jax.Array], rho: jax.Array, size: jax.Array
) -> list[jax.Array]:
    """The matrices of the lowest scores, such that ``rho`` of ``size`` numbers are left.

    Those that were frozen come first; numbers that are no longer there count as frozen.
    """
    means = [matrix_scores(x) for x in scores.elements()]
    everywhere = lambda x: constrain(x, partition_of(x) and PartitionSpec(*[None] * x.ndim))
    flat = lambda arrays: jnp.concatenate([everywhere(x).reshape(-1) for x in arrays])
    sizes = np.concatenate(
        [np.full(m.size, math.prod(x.shape[-2:])) for m, x in zip(means, scores[0], strict=True)]
    ).astype(np.int32)
    order = jnp.argsort(jnp.where(flat(frozen), -1, flat(means)), stable=True)
    gone = size - int(sizes.sum()) + jnp.cumsum(jnp.asarray(sizes)[order])
    stops = jnp.zeros(sizes.shape, bool).at[order].set(gone <= jnp.floor(size * (1 - rho)))
    ends = np.cumsum([m.size for m in means])
    parts = jnp.split(stops, ends[:-1])
    return [
        constrain(part.reshape(m.shape), partition_of(m))
        for part, m in zip(parts, means, strict=True)
    ]


def matrix_scores(elements: jax.Array) -> jax.Array:
    """Means ``[*batch]`` of ``elements [*batch, m, n]``, of equal ones exactly what they are."""
    least = jnp.min(elements, axis=_MATRIX, keepdims=True, initial=jnp.inf)
    size = max(math.prod(elements.shape[-2:]), 1)
    return jnp.squeeze(least, _MATRIX) + jnp.sum(elements - least, axis=_MATRIX) / size


def kth_smallest(elements: list[jax.Array], excluded: list[jax.Array], k: jax.Array) -> jax.Array:
    """The ``k``-th smallest (from 1) of numbers that are not negative, all arrays together; or 0.

    Bisects the bits of a float32, which order as its values do: 31 counts, and neither a copy of
    all in one array nor a sort of them, which a mesh would have to gather.

    Args:
      elements: ``[*batch, m, n]``, float32.
      excluded: ``[*batch]``, matrices that do not count.
      k: Zero gives 0.
    """
    bits = [
        jnp.where(over(out, x), _LARGEST, jax.lax.bitcast_convert_type(x, jnp.int32))
        for x, out in zip(elements, excluded, strict=True)
    ]

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = sum(jnp.sum(x <= middle) for x in bits) >= k
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    infinity = np.float32(np.inf).view(np.int32)
    bounds = (jnp.zeros([], jnp.int32), jnp.asarray(infinity))
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, bounds)[1], jnp.float32)


def over(flag: jax.Array, x: jax.Array) -> jax.Array:
    """Flags ``[*batch]`` as they broadcast over ``x [*batch, ...]``, sharded as its batch is.

    Over an ``x`` of other batch axes: whether all are set.
    """
    if x.shape[: flag.ndim] != flag.shape:
        flag = jnp.all(flag)
    partition = partition_of(x)
    if partition is not None:
        flag = constrain(flag, PartitionSpec(*partition[: flag.ndim]))
    return jnp.expand_dims(flag, tuple(range(flag.ndim, x.ndim)))
