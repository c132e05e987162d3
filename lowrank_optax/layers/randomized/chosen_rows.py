"""Which rows stand for all of them, and with what weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.layers.randomized.sketch import SketchKind


class Chosen(NamedTuple):
    """Rows of [B, N] that stand for all of them.

    Attributes:
      index: [p] int32.
      weight: [p] float32, over B / p; None if all are 1.
    """

    index: jax.Array
    weight: jax.Array | None

    def take(self, x: jax.Array) -> jax.Array:
        """The rows of x, without their weights."""
        return jnp.take(x, self.index, axis=0, mode="clip")

    def take_of_strata(self, x: jax.Array) -> jax.Array:
        """The same, where each is of another p-th part of the rows, by the device that has it."""
        size = len(self.index)
        parts = x.reshape(size, len(x) // size, x.shape[1])
        within = self.index - jnp.arange(size) * parts.shape[1]
        return jnp.take_along_axis(parts, within[:, None, None], axis=1, mode="clip")[:, 0]


def choose_rows(
    kind: SketchKind, size: int, key: Any, x: jax.Array, valid: jax.Array | None
) -> Chosen:
    """p of the B rows of x, of which those that are not ``valid`` have no chance.

    Args:
      kind: One of ``"rows"``, ``"stratified"``, ``"norm_weighted"``, ``"winner_take_all"``.
      size: p, below B.
      key: Of the random numbers.
      x: [B, N]; kinds other than the first two read its norms.
      valid: [B] bool, or None: all are.
    """
    if kind == "rows":
        return _without_replacement(size, key, len(x), valid)
    if kind == "stratified":
        return _stratified(size, key, len(x), valid)
    chances = row_chances(x, valid)
    if kind == "norm_weighted":
        index = jax.random.choice(key, len(x), (size,), p=chances)
        return Chosen(index, over(1 / len(x), chances[index]))
    return _winners_and_drawn(size, key, chances)


def row_chances(x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """The chance of each row of x [B, N], in proportion to its norm: [B], float32 at least.

    0 where all norms are.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    norms = jnp.linalg.norm(wide, axis=1)
    if valid is not None:
        norms = jnp.where(valid, norms, 0)
    return over(norms, jnp.sum(norms))


def winners(chances: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rows by falling chance, how many of the first are kept, the chance left to the others.

    The number c is the one, below p, at which (1 - the chances of c rows) / (p - c) is least.
    """
    order = jnp.argsort(-chances)
    falling = chances[order]
    # The chance that is left, added up from the smallest: exactly 0 where nothing is left.
    left = jnp.cumsum(falling[::-1])[::-1][:size]
    kept = jnp.argmin(left / (size - jnp.arange(size)))
    return order, kept, left[kept]


def over(a: jax.Array | float, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def _without_replacement(size: int, key: Any, count: int, valid: jax.Array | None) -> Chosen:
    shuffled = jax.random.permutation(key, count)
    if valid is None:
        return Chosen(shuffled[:size], None)
    shuffled = shuffled[jnp.argsort(~valid[shuffled], stable=True)]  # the valid ones first
    number = jnp.sum(valid)
    relative = jnp.maximum(number, size) / count
    weight = jnp.where(jnp.arange(size) < number, relative, 0)
    return Chosen(shuffled[:size], weight)


def _stratified(size: int, key: Any, count: int, valid: jax.Array | None) -> Chosen:
    """One row of each of p consecutive strata, whose sizes differ by at most 1."""
    number = count if valid is None else jnp.sum(valid)
    least, larger = number // size, number % size
    stratum = jnp.arange(size)
    sizes = least + (stratum < larger)
    start = stratum * least + jnp.minimum(stratum, larger)
    index = start + jax.random.randint(key, (size,), 0, jnp.maximum(sizes, 1))
    if valid is None:
        if count % size == 0:
            return Chosen(index, None)
        return Chosen(index, sizes * (size / count))
    in_order = jnp.argsort(~valid, stable=True)
    return Chosen(in_order[index], sizes * (size / count))


def _winners_and_drawn(size: int, key: Any, chances: jax.Array) -> Chosen:
    """The rows of the largest chances for sure, and others at random in the remaining places."""
    order, kept, left = winners(chances, size)
    falling = chances[order]
    rest = jnp.where(jnp.arange(len(falling)) < kept, 0, falling)
    drawn = jax.random.choice(key, len(falling), (size,), p=rest)
    place = jnp.arange(size)
    is_kept = place < kept
    weight = jnp.where(is_kept, 1, over(left / (size - kept), falling[drawn]))
    return Chosen(order[jnp.where(is_kept, place, drawn)], weight * (size / len(chances)))
