"""Columns of one fixed cosine matrix, chosen by how much of the gradient lies on each.

The basis of a leaf is ``r`` indices; the columns are computed where they are used. Nothing is
decomposed, so the columns may be chosen again at every step.
"""

from collections.abc import Callable
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.view import RankSpec, View

_SMALLEST = 256  # halves below are not worth splitting further
_EXACT_PRODUCTS = 1 << 15  # lengths below whose phases fit an int32


def dct(
    rank: RankSpec, order: int = 1, transform: Literal["products", "fft"] = "products"
) -> base.Subspace:
    r"""Subspace of the ``rank`` cosines on which most of the gradient lies.

    The ``d`` basis vectors are the columns of the orthogonal matrix (DCT of type II, transposed)

    .. math::
      B_{jk} = \sqrt{2/d} \, \cos(\pi k (2j + 1) / 2d), \qquad B_{j0} = \sqrt{1/d}.

    The coefficients ``Bᵀ G`` of a gradient are scored by the norm of each row, and the indices of
    the largest are stored in ascending order: ``r`` integers instead of ``r·d`` floats. The
    coefficients cost one product with a third of a full matrix, since cosines are symmetric (or an
    FFT), and are a full-size temporary while the indices are chosen.

    Args:
      rank: Number of columns; at most the smaller side of each matrix.
      order: Norm of the scores: 1 (the authors' default) or 2, which captures the most energy that
        any ``rank`` columns can.
      transform: ``"products"``, which run on the matrix units and shard, or ``"fft"``.

    Raises:
      TypeError: If `rank` is of another type.
      ValueError: If `rank` is below 1, or another argument unknown.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> rows = [[1, 2, 3, 4], [4, 3, 2, 1], [1, 1, 1, 1], [0, 1, 0, 1], [2, 2, 0, 0]]
      >>> rule, gradient = lro.subspaces.dct(rank=2), jnp.array(rows, jnp.float32)
      >>> view = lro.View.of(gradient, axis=-1, rank=rule.rank)
      >>> rule.refresh(jax.random.key(0), gradient, rule.init(view), None, view).tolist()
      [0, 1]

    Reference:
      Modoranu et al., SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models,
      2025, https://arxiv.org/abs/2505.17967, section 3. The paper's matmul code takes type III and
      its FFT code type II; here both are type II.
    """
    if order not in (1, 2):
        raise ValueError(f"order={order!r} must be 1 or 2.")
    if transform not in ("products", "fft"):
        raise ValueError(f"transform={transform!r} must be 'products' or 'fft'.")
    coefficient_scores = scores_by_products if transform == "products" else scores_by_fft

    def init(view: View) -> jax.Array:
        indices = explicit_sharding.zeros(
            (*view.batch, view.rank), jnp.int32, view.partitioned(None)
        )
        return indices - 1  # of a column of zeros

    def refresh(
        key: jax.Array, matrix: jax.Array, basis: jax.Array, momentum: Any, view: View
    ) -> jax.Array:
        del key, momentum
        gathered = explicit_sharding.constrain(matrix, _whole_along_axis(matrix, view))
        aligned = gathered.astype(view.dtype) if view.axis == -2 else gathered.astype(view.dtype).mT
        size = jnp.abs if order == 1 else jnp.square
        scores = explicit_sharding.constrain(
            coefficient_scores(aligned, size), view.partitioned(None)
        )
        chosen = jax.lax.top_k(scores, basis.shape[-1])[1]
        return jnp.sort(chosen, axis=-1).astype(jnp.int32)

    matrix_of = lambda basis, view: cosines(basis, view.length, view.dtype)
    return base.from_basis(rank, refresh, init=init, matrix_of=matrix_of, rotate=_rotate)


def _whole_along_axis(matrix: jax.Array, view: View) -> PartitionSpec | None:
    """A partition that does not shard the compressed axis, but the other one more.

    The gradient is then exchanged among devices and not gathered, unless the sizes do not divide.
    """
    if view.partition is None:
        return None
    names = [n for axis in (view.across, view.axis) for n in _names(view.partition[axis])]
    sizes = jax.typeof(matrix).sharding.mesh.shape
    if view.shape[view.across] % math.prod(sizes[name] for name in names):
        return view.projected_partition
    cut = tuple(names) or None
    return view.partitioned(*((None, cut) if view.axis == -2 else (cut, None)))


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a partition."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def cosines(frequencies: jax.Array, length: int, dtype: Any) -> jax.Array:
    """Columns ``[*batch, length, r]`` of the cosine matrix; zeros for negative frequencies."""
    k, j = frequencies[..., None, :], jnp.arange(length, dtype=jnp.int32)[:, None]
    phase = _modular_product(k, 2 * j + 1, 4 * length)
    columns = jnp.cos(phase.astype(dtype) * (math.pi / (2 * length)))
    size = jnp.where(k == 0, math.sqrt(1 / length), math.sqrt(2 / length)).astype(dtype)
    return jnp.where(k < 0, 0, size * columns)


def scores_by_products(matrix: jax.Array, size: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Sums ``[*batch, d]`` of the sizes of each row of ``Bᵀ matrix [*batch, d, n]``, unscaled.

    Even cosines are symmetric and odd ones antisymmetric, so each half needs only half the rows,
    and the even half is a cosine transform of half the length: ``d²/3`` instead of ``d²``.
    """
    return _first_scaled(_sums_by_products(matrix, size), size)


def _sums_by_products(matrix: jax.Array, size: Callable[[jax.Array], jax.Array]) -> jax.Array:
    length = matrix.shape[-2]
    if length <= _SMALLEST or length % 2:
        return _sums(_unscaled_cosines(length, matrix.dtype, odd=False), matrix, size)
    half = length // 2
    top, bottom = matrix[..., :half, :], matrix[..., half:, :][..., ::-1, :]
    even = _sums_by_products(top + bottom, size)
    odd = _sums(_unscaled_cosines(half, matrix.dtype, odd=True), top - bottom, size)
    return jnp.stack([even, odd], axis=-1).reshape(*even.shape[:-1], length)


def _sums(rows: jax.Array, matrix: jax.Array, size: Callable[[jax.Array], jax.Array]) -> jax.Array:
    products = jnp.einsum("kd,...dn->...kn", rows, matrix, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(size(products), axis=-1)


def _unscaled_cosines(length: int, dtype: Any, odd: bool) -> jax.Array:
    """All cosines ``[length, length]``; the odd ones of twice the length if ``odd``."""
    k = jnp.arange(length, dtype=jnp.int32)[:, None]
    frequencies, period = (2 * k + 1, 8 * length) if odd else (k, 4 * length)
    j = jnp.arange(length, dtype=jnp.int32)[None]
    phase = _modular_product(frequencies, 2 * j + 1, period)
    return jnp.cos(phase.astype(dtype) * (2 * math.pi / period))


def scores_by_fft(matrix: jax.Array, size: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The same as `scores_by_products`, by one real FFT along the rows.

    Source: Makhoul, A fast cosine transform in one and two dimensions, IEEE Trans. ASSP 28 (1980).
    """
    rows, length = matrix.mT, matrix.shape[-2]
    reordered = jnp.concatenate([rows[..., ::2], rows[..., 1::2][..., ::-1]], axis=-1)
    spectrum = jnp.fft.rfft(reordered, axis=-1)
    count = length // 2 + 1
    angle = jnp.arange(count, dtype=matrix.dtype) * (-math.pi / (2 * length))
    # The real part is coefficient k, the imaginary part that of d - k, negated.
    rotated = spectrum * jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
    low = jnp.sum(size(rotated.real), axis=-2)
    high = jnp.sum(size(rotated.imag), axis=-2)[..., 1 : length - count + 1][..., ::-1]
    return _first_scaled(jnp.concatenate([low, high], axis=-1), size)


def _first_scaled(scores: jax.Array, size: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The scores with that of the constant, whose scale is less by a root of two, as small."""
    first = size(jnp.asarray(math.sqrt(1 / 2), scores.dtype))
    return jnp.where(jnp.arange(scores.shape[-1]) == 0, first * scores, scores)


def _modular_product(a: jax.Array, b: jax.Array, period: int) -> jax.Array:
    """``a·b mod period`` in int32, for factors below ``period``: cosines of exact phases."""
    if period < 4 * _EXACT_PRODUCTS:
        return (a * b) % period
    high, low = a // 256, a % 256
    return (((high * b) % period) * 256 + low * b) % period


def _rotate(
    old: jax.Array, new: jax.Array, projected: jax.Array, view: View, squared: bool = False
) -> jax.Array:
    """Rows of indices that stay are moved to their new position; those of new ones are zero."""
    del squared  # the entries of this matrix are zeros and ones
    match = (new[..., :, None] == old[..., None, :]) & (new >= 0)[..., :, None]
    if view.partition is not None:
        letters = "...sr,...rn->...sn" if view.axis == -2 else "...sr,...mr->...ms"
        between = match.astype(projected.dtype)
        return base.product(letters, between, projected, view.projected_partition)
    position, stays = jnp.argmax(match, axis=-1), jnp.any(match, axis=-1)
    spread = (lambda x: x[..., :, None]) if view.axis == -2 else (lambda x: x[..., None, :])
    moved = jnp.take_along_axis(projected, spread(position), axis=view.axis)
    return jnp.where(spread(stays), moved, 0)
