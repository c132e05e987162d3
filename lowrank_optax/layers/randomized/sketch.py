"""Sketches: p rows that stand for B rows, such that products of two sketches keep their mean.

With a random S [B, p] for which E[S·Sᵀ] = I, (SᵀX)ᵀ(SᵀY) has the expectation XᵀY. S itself is never
stored: it is drawn again from a `Seed`.
"""

import dataclasses
import math
import numbers
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.states.precision import to_float32

SketchKind: TypeAlias = Literal[
    "rows",
    "stratified",
    "norm_weighted",
    "winner_take_all",
    "gaussian",
    "rademacher",
    "srht",
    "dct",
]

ROW_KINDS = ("rows", "stratified", "norm_weighted", "winner_take_all")
"""Kinds whose S has one nonzero entry per column: rows, chosen and weighted."""


@dataclasses.dataclass(frozen=True)
class Sketch:
    """Kind and size of a sketch of B rows: p rows, a fraction of B or an absolute number.

    Frozen and hashable: it may be a static argument of a jitted function, or a field of a module.

    Attributes:
      kind: How the p rows are made: ``"stratified"`` and ``"rows"``, drawn uniformly;
        ``"norm_weighted"`` and ``"winner_take_all"``, by their norms; ``"gaussian"``,
        ``"rademacher"``, ``"srht"`` and ``"dct"``, sums over all rows. See `randomized_linear`.
      fraction: p / B, above 0 and at most 1; p is rounded down.
      size: p itself, instead of ``fraction``.
      min_size: Lower bound of p.
      max_size: Upper bound of p.

    Raises:
      ValueError: If not exactly one of ``fraction`` and ``size`` is given, the kind is unknown, or
        a number is out of its range.

    Example:
      >>> import lowrank_optax as lro
      >>> sketch = lro.layers.Sketch(fraction=0.1, min_size=8)
      >>> sketch.rows(4096), sketch.rows(32), sketch.rows(4)
      (409, 8, 4)
    """

    kind: SketchKind = "stratified"
    fraction: float | None = None
    size: int | None = None
    min_size: int = 1
    max_size: int | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if (self.fraction is None) == (self.size is None):
            given = f"fraction={self.fraction!r} and size={self.size!r}"
            raise ValueError(f"Give one of fraction and size, not {given}.")
        is_number = lambda x, of: isinstance(x, of) and not isinstance(x, bool)
        if self.fraction is not None and not (
            is_number(self.fraction, numbers.Real) and 0 < self.fraction <= 1
        ):
            raise ValueError(f"fraction={self.fraction!r} must be above 0 and at most 1.")
        for name in ("size", "min_size", "max_size"):
            value = getattr(self, name)
            if value is not None and not (is_number(value, numbers.Integral) and value >= 1):
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
        if self.max_size is not None and self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} must be at least min_size={self.min_size}.")

    def rows(self, count: int) -> int:
        """Return p for ``count`` rows, at most ``count``."""
        if self.fraction is None:
            size = self.size or 0
        else:  # 0.29 * 100 is 28.999...
            size = math.floor(self.fraction * count + 1e-9)
        size = max(size, self.min_size)
        return min(size, count, count if self.max_size is None else self.max_size)


def check_kind(kind: Any) -> None:
    """Raise ValueError if ``kind`` is unknown."""
    if kind not in get_args(SketchKind):
        kinds = ", ".join(map(repr, get_args(SketchKind)))
        raise ValueError(f"kind={kind!r} must be one of {kinds}.")


class ChosenRows(NamedTuple):
    """Rows of [B, N] that stand for all of them.

    Attributes:
      index: [p] int32.
      weight: [p] float32, relative to B / p; None if all are 1.
    """

    index: jax.Array
    weight: jax.Array | None


class Seed(NamedTuple):
    """What S is drawn from, for the input and again for the cotangent.

    Attributes:
      key: PRNG key, if it alone determines S.
      chosen: Rows, if their choice depends on the input or on the valid rows.
      valid: [B] bool, for kinds that sum rows; None if all rows are valid.
    """

    key: Any
    chosen: ChosenRows | None
    valid: jax.Array | None


def draw_seed(kind: SketchKind, size: int, key: Any, x: jax.Array, valid: Any) -> Seed:
    """What has to be saved to draw S again, for x [B, N]. If p is B, S is the identity."""
    if size == len(x):
        return Seed(None, None, valid)
    if kind not in ROW_KINDS:
        return Seed(key, None, valid)
    if valid is None and kind in ("rows", "stratified"):
        return Seed(key, None, None)
    return Seed(None, jax.lax.stop_gradient(choose_rows(kind, size, key, x, valid)), None)


def sketch_rows(
    kind: SketchKind, size: int, seed: Seed, x: jax.Array, precision: Any, weighted: bool = False
) -> jax.Array:
    """SᵀX [p, N] without `scale`; chosen rows, if ``weighted``, times their squared weights.

    In a product of two sketches one is weighted. Sums of rows are float32 at least.
    """
    if size == len(x) or kind not in ROW_KINDS:
        x = x if seed.valid is None else jnp.where(seed.valid[:, None], x, 0)
        return x if size == len(x) else _sum_rows(kind, size, seed.key, x, precision)
    chosen = seed.chosen
    if chosen is None:
        chosen = choose_rows(kind, size, seed.key, x, None)
    if kind == "stratified" and chosen.weight is None:
        # Strata of one size: the device that has a stratum takes its row.
        strata = x.reshape(size, len(x) // size, x.shape[1])
        within = chosen.index - jnp.arange(size) * strata.shape[1]
        rows = jnp.take_along_axis(strata, within[:, None, None], axis=1, mode="clip")[:, 0]
    else:
        rows = jnp.take(x, chosen.index, axis=0, mode="clip")
    if weighted and chosen.weight is not None:
        rows = (to_float32(rows) * chosen.weight[:, None]).astype(x.dtype)
    return rows


def scale(kind: SketchKind, size: int, count: int) -> float:
    """The remaining factor of a product of two sketches."""
    return count / size if kind in ROW_KINDS else 1.0


def _sum_rows(kind: SketchKind, size: int, key: Any, x: jax.Array, precision: Any) -> jax.Array:
    if kind in ("gaussian", "rademacher"):
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        if kind == "gaussian":
            s = jax.random.normal(key, (size, len(x)), dtype).astype(x.dtype)
        else:
            s = _random_signs(key, (size, len(x)), x.dtype)
        total = jnp.matmul(s, x, precision=precision, preferred_element_type=dtype)
        return total * size**-0.5
    key, sign_key = jax.random.split(key)
    if kind == "srht":
        signs = _random_signs(sign_key, (len(x), 1), x.dtype)
        mixed = hadamard_transform(x * signs, precision)
    else:
        mixed = cosine_transform(x)
    index = jax.random.permutation(key, len(mixed))[:size]
    return jnp.take(mixed, index, axis=0, mode="clip") * (len(mixed) / size) ** 0.5


def _random_signs(key: Any, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """1 and -1 with equal chances, 32 from one random word."""
    rows, columns = shape
    words = jax.random.bits(key, (rows, -(-columns // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bits = bits.reshape(rows, -1)[:, :columns]
    return 1 - 2 * bits.astype(dtype)


def hadamard_transform(x: jax.Array, precision: Any = None) -> jax.Array:
    """H·x/√B' of x [B, N], padded with zeros to B', the next power of two.

    By Kronecker factors of at most 64 x 64, a size that suits matrix units, in few passes:
    B'·N·(log2(B')/6)·128 operations.
    """
    exponent = max(len(x) - 1, 0).bit_length()
    count = 2**exponent
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    mixed = jnp.pad(x, ((0, count - len(x)), (0, 0)))
    for done in range(0, exponent, 6):
        bits = min(6, exponent - done)
        mixed = mixed.reshape(2**done, 2**bits, -1)
        index = np.arange(2**bits)
        parity = np.bitwise_count(index[:, None] & index) % 2
        factor = jnp.asarray(1.0 - 2.0 * parity, mixed.dtype)
        mixed = jnp.einsum(
            "ij,ajb->aib", factor, mixed, precision=precision, preferred_element_type=dtype
        )
    return mixed.reshape(count, -1).astype(dtype) * count**-0.5


def cosine_transform(x: jax.Array) -> jax.Array:
    """The orthonormal DCT-II of each column of x [B, N], float32 at least."""
    return jax.scipy.fft.dct(to_float32(x), axis=0, norm="ortho")


def choose_rows(
    kind: SketchKind, size: int, key: Any, x: jax.Array, valid: jax.Array | None
) -> ChosenRows:
    """Choose p of the B rows of x [B, N], p < B, by one of `ROW_KINDS`.

    Rows that are not valid ([B] bool) have no chance. The kinds ``"norm_weighted"`` and
    ``"winner_take_all"`` read the norms of x.
    """
    if kind == "rows":
        return _without_replacement(size, key, len(x), valid)
    if kind == "stratified":
        return _stratified(size, key, len(x), valid)
    chances = row_chances(x, valid)
    if kind == "norm_weighted":
        index = jax.random.choice(key, len(x), (size,), p=chances)
        return ChosenRows(index, divide_or_0(1 / len(x), chances[index]))
    order, number, left = winners(chances, size)
    sorted_chances = chances[order]
    others = jnp.where(jnp.arange(len(x)) < number, 0, sorted_chances)
    drawn = jax.random.choice(key, len(x), (size,), p=others)
    position = jnp.arange(size)
    is_winner = position < number
    weight = jnp.where(is_winner, 1, divide_or_0(left / (size - number), sorted_chances[drawn]))
    return ChosenRows(order[jnp.where(is_winner, position, drawn)], weight * (size / len(x)))


def row_chances(x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """The chance of each row of x [B, N], proportional to its norm; 0 if all norms are."""
    norms = jnp.linalg.norm(to_float32(x), axis=1)
    if valid is not None:
        norms = jnp.where(valid, norms, 0)
    return divide_or_0(norms, jnp.sum(norms))


def winners(chances: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rows by descending chance, the number c of winners, and the total chance of the others.

    c is the number below p for which (1 - the chances of c rows) / (p - c) is least.
    """
    order = jnp.argsort(-chances)
    # Summed from the smallest: exactly 0 if nothing is left.
    left = jnp.cumsum(chances[order][::-1])[::-1][:size]
    number = jnp.argmin(left / (size - jnp.arange(size)))
    return order, number, left[number]


def _without_replacement(size: int, key: Any, count: int, valid: jax.Array | None) -> ChosenRows:
    shuffled = jax.random.permutation(key, count)
    if valid is None:
        return ChosenRows(shuffled[:size], None)
    shuffled = shuffled[jnp.argsort(~valid[shuffled], stable=True)]  # the valid ones first
    number = jnp.sum(valid)
    relative = jnp.maximum(number, size) / count
    weight = jnp.where(jnp.arange(size) < number, relative, 0)
    return ChosenRows(shuffled[:size], weight)


def _stratified(size: int, key: Any, count: int, valid: jax.Array | None) -> ChosenRows:
    """One row of each of p consecutive strata, whose sizes differ by at most 1."""
    number = count if valid is None else jnp.sum(valid)
    least, larger = number // size, number % size
    stratum = jnp.arange(size)
    sizes = least + (stratum < larger)
    start = stratum * least + jnp.minimum(stratum, larger)
    index = start + jax.random.randint(key, (size,), 0, jnp.maximum(sizes, 1))
    if valid is not None:
        index = jnp.argsort(~valid, stable=True)[index]
    elif count % size == 0:
        return ChosenRows(index, None)
    return ChosenRows(index, sizes * (size / count))


def divide_or_0(a: jax.Array | float, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
