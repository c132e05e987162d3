"""The kinds of sketches: p rows that stand for B rows, such that products of two keep their mean.

With S of shape [B, p] and E[S·Sᵀ] = I, (SᵀX)ᵀ(SᵀY) has the expectation XᵀY. S is never stored: what
is drawn again from the same `Seed` is the same.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.layers.randomized.chosen_rows import Chosen, choose_rows
from lowrank_optax.layers.randomized.sketch import SketchKind
from lowrank_optax.layers.randomized.transforms import cosine_transform, hadamard_transform

ROW_KINDS = ("rows", "stratified", "norm_weighted", "winner_take_all")
"""The kinds whose S has one entry other than 0 in each column: rows, chosen and weighted."""


class Seed(NamedTuple):
    """What S is drawn from, for the input and again for the cotangent.

    Attributes:
      key: Of what a key alone determines.
      chosen: The rows, where their choice depends on the input or on which are valid.
      valid: [B] bool, of kinds that add rows up; None if all are.
    """

    key: Any
    chosen: Chosen | None
    valid: jax.Array | None


def seed_of(kind: SketchKind, size: int, key: Any, x: jax.Array, valid: jax.Array | None) -> Seed:
    """What has to be kept to draw S again; x [B, N]. With p = B, S is the identity."""
    if size == len(x):
        return Seed(None, None, valid)
    if kind not in ROW_KINDS:
        return Seed(key, None, valid)
    if valid is None and kind in ("rows", "stratified"):
        return Seed(key, None, None)
    return Seed(None, jax.lax.stop_gradient(choose_rows(kind, size, key, x, valid)), None)


def sketch_input(
    kind: SketchKind, size: int, seed: Seed, x: jax.Array, precision: Any = None
) -> jax.Array:
    """SᵀX, but for the weights of rows: [p, N], float32 at least where rows are added up."""
    if size == len(x):
        return _only_valid(x, seed.valid)
    if kind in ROW_KINDS:
        return _take(kind, _chosen(kind, size, seed, x), x)
    return _added_up(kind, size, seed, x, precision)


def sketch_cotangent(
    kind: SketchKind, size: int, seed: Seed, y: jax.Array, precision: Any = None
) -> jax.Array:
    """SᵀY, with the weights of rows, squared, but without `scale`: [p, M]."""
    if size == len(y):
        return _only_valid(y, seed.valid)
    if kind not in ROW_KINDS:
        return _added_up(kind, size, seed, y, precision)
    chosen = _chosen(kind, size, seed, y)
    rows = _take(kind, chosen, y)
    if chosen.weight is None:
        return rows
    return (_wide(rows) * chosen.weight[:, None]).astype(y.dtype)


def scale(kind: SketchKind, size: int, count: int) -> float:
    """What a product of two sketches is still to be multiplied by."""
    return count / size if kind in ROW_KINDS else 1.0


def _chosen(kind: SketchKind, size: int, seed: Seed, x: jax.Array) -> Chosen:
    if seed.chosen is not None:
        return seed.chosen
    return choose_rows(kind, size, seed.key, x, None)


def _take(kind: SketchKind, chosen: Chosen, x: jax.Array) -> jax.Array:
    if kind == "stratified" and chosen.weight is None:  # all strata of one size
        return chosen.take_of_strata(x)
    return chosen.take(x)


def _added_up(kind: SketchKind, size: int, seed: Seed, x: jax.Array, precision: Any) -> jax.Array:
    x = _only_valid(x, seed.valid)
    if kind == "gaussian":
        return _product(jax.random.normal(seed.key, (size, len(x)), _wide(x).dtype), x, precision)
    if kind == "rademacher":
        return _product(random_signs(seed.key, (size, len(x)), x.dtype), x, precision)
    for_rows, for_signs = jax.random.split(seed.key)
    if kind == "srht":
        signs = random_signs(for_signs, (len(x), 1), x.dtype)
        mixed = hadamard_transform(x * signs, precision)
    else:
        mixed = cosine_transform(x)
    picked = choose_rows("rows", size, for_rows, mixed, None).take(mixed)
    return picked * (len(mixed) / size) ** 0.5


def _only_valid(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    return x if valid is None else jnp.where(valid[:, None], x, 0)


def _product(s: jax.Array, x: jax.Array, precision: Any) -> jax.Array:
    """Sᵀx/√p for the transposed S, in x's dtype, accumulated in float32 at least."""
    wide = _wide(x).dtype
    total = jnp.matmul(s.astype(x.dtype), x, precision=precision, preferred_element_type=wide)
    return total * len(s) ** -0.5


def random_signs(key: Any, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """1 and -1 with equal chances, of which 32 need one random word."""
    rows, columns = shape
    words = jax.random.bits(key, (rows, -(-columns // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bits = bits.reshape(rows, -1)[:, :columns]
    return 1 - 2 * bits.astype(dtype)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
