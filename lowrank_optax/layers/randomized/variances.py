"""The exact noise of a randomized linear's gradient, of its mini-batch, and the size to choose."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.randomized.sketch import (
    SketchKind,
    check_kind,
    cosine_transform,
    divide_or_0,
    row_chances,
    winners,
)


class _Norms(NamedTuple):
    """Squared norms, for X [B, N] and Y [B, M]: scalars, except for `rows`, [B]."""

    x: jax.Array  # ‖X‖²
    y: jax.Array  # ‖Y‖²
    product: jax.Array  # ‖XᵀY‖²
    rows: jax.Array  # ‖x_i‖²·‖y_i‖²


def sketch_variance(x: jax.Array, y: jax.Array, size: int, kind: SketchKind) -> jax.Array:
    r"""Compute the expected squared error of the kernel's gradient over all draws of the sketch.

    D² = E‖(SᵀX)ᵀ(SᵀY) - XᵀY‖² (Frobenius), exactly, from a = ‖X‖², c = ‖Y‖², g = ‖XᵀY‖² and
    d = Σ_i ‖x_i‖²·‖y_i‖²::

        rows             (B - p)/(p·(B - 1)) · (B·d - g)
        stratified       Σ_k [b_k·Σ_{i in k} ‖x_i‖²·‖y_i‖² - ‖Σ_{i in k} x_i·y_iᵀ‖²], strata of b_k
        norm_weighted    (Σ_i ‖x_i‖²·‖y_i‖²/q_i - g)/p,   q_i = ‖x_i‖/Σ_j ‖x_j‖
        winner_take_all  the same for p - c draws from the rows other than the c winners
        gaussian         (a·c + g)/p
        rademacher       (a·c + g - 2·d)/p
        srht             (B' - p)/(p·(B' - 1)) · (a·c + g - 2·d),   B' the next power of two
        dct              as rows, for the transformed X and Y

    If p is B it is 0, as `randomized_linear` is the dense layer then. No [B, B] matrix is formed.

    Args:
      x: Input, [..., N], B rows in all.
      y: Cotangent of the output, [..., M], with the same leading axes.
      size: Number of rows p of the sketch.
      kind: Kind of the sketch, as in `Sketch`.

    Returns:
      A scalar, float32 at least, in units of the squared gradient.

    Raises:
      ValueError: If the rows of x and y differ in number, or the kind is unknown.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> x = jnp.array([[1.0, 0], [0, 2], [1, 1], [2, -1]])
      >>> y = jnp.array([[1.0, 1], [0, 1], [2, 0], [1, -1]])
      >>> for kind in ("rows", "rademacher", "gaussian"):
      ...     print(kind, lro.layers.sketch_variance(x, y, 2, kind))
      rows 20.0
      rademacher 48.0
      gaussian 72.0
      >>> print(lro.layers.minibatch_variance(x, y), f"{lro.layers.alignment(x, y):.3f}")
      20.0 0.333

    Reference:
      Bershatsky et al., Memory-Efficient Backpropagation through Large Linear Layers, 2022,
      https://arxiv.org/abs/2201.13195, Section 3. Its eq. for D² has the wrong sign before g.
    """
    x, y = _rows(x, y)
    check_kind(kind)
    if size < 1:
        raise ValueError(f"size={size!r} must be at least 1.")
    if size >= len(x):
        return jnp.zeros((), x.dtype)
    if kind == "dct":
        x, y = cosine_transform(x), cosine_transform(y)
    norms = _norms(x, y)
    # The share of the variance of one row that p of B different rows have.
    without_replacement = lambda count: (count - size) / (size * (count - 1))
    if kind in ("rows", "dct"):
        variance = without_replacement(len(x)) * (len(x) * jnp.sum(norms.rows) - norms.product)
    elif kind == "stratified":
        variance = _stratified_variance(x, y, norms.rows, size)
    elif kind == "norm_weighted":
        total = jnp.sum(divide_or_0(norms.rows, row_chances(x)))
        variance = (total - norms.product) / size
    elif kind == "winner_take_all":
        chances = row_chances(x)
        order, number, left = winners(chances, size)
        is_drawn = jnp.zeros(len(x), bool).at[order].set(jnp.arange(len(x)) >= number)
        total = jnp.sum(jnp.where(is_drawn, divide_or_0(norms.rows, chances), 0)) * left
        exact = _squared_product(jnp.where(is_drawn[:, None], x, 0), y)
        variance = (total - exact) / (size - number)
    elif kind == "gaussian":
        variance = (norms.x * norms.y + norms.product) / size
    else:
        variance = norms.x * norms.y + norms.product - 2 * jnp.sum(norms.rows)
        padded = 1 << (len(x) - 1).bit_length()
        variance *= 1 / size if kind == "rademacher" else without_replacement(padded)
    return jnp.maximum(variance, 0)  # below 0 only by rounding; NaN stays


def minibatch_variance(x: jax.Array, y: jax.Array) -> jax.Array:
    """Estimate the variance of the exact gradient XᵀY, as a sum over a random sample of B rows.

    D²_SGD = (B·d - g)/(B - 1), with the d and g of `sketch_variance`: the unbiased estimate of the
    variance of the summed gradient, a float32 scalar or wider. A sketch that adds less than this
    costs little: with ``kind="rows"`` it adds (B - p)/p times this.

    Args:
      x: Input, [..., N], B rows in all, at least 2.
      y: Cotangent of the output, [..., M], with the same leading axes.

    Raises:
      ValueError: If the rows of x and y differ in number, or there is only one.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> x, y = jnp.array([[1.0], [3.0]]), jnp.array([[1.0], [1.0]])  # gradients 1 and 3
      >>> print(lro.layers.minibatch_variance(x, y))  # twice the sample variance, 2
      4.0
    """
    x, y = _rows(x, y)
    if len(x) < 2:
        raise ValueError(f"x has {len(x)} rows; the variance among them needs at least 2.")
    norms = _norms(x, y)
    return jnp.maximum(len(x) * jnp.sum(norms.rows) - norms.product, 0) / (len(x) - 1)


def alignment(x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute α = ‖XᵀY‖² / (‖X‖²·‖Y‖²), from 0 to 1: how much the rows agree; 0 if X or Y is 0.

    Arguments, errors and dtype are those of `sketch_variance`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> print(lro.layers.alignment(jnp.eye(2), jnp.eye(2)))
      0.5

    Reference:
      Bershatsky et al., 2022, https://arxiv.org/abs/2201.13195, Section 3.
    """
    norms = _norms(*_rows(x, y))
    return divide_or_0(norms.product, norms.x * norms.y)


def choose_sketch_size(
    x: jax.Array, y: jax.Array, *, noise_ratio: float = 1.0, kind: SketchKind = "rows"
) -> int:
    """Find the least p for which the sketch adds at most ``noise_ratio`` times the batch's noise.

    That is `sketch_variance` <= noise_ratio · `minibatch_variance`. For ``"rows"`` it depends only
    on the number of rows: (B - p)/p <= noise_ratio, so a ratio of 1 needs half of them. Otherwise
    it is found by bisection, with log2(B) evaluations of the variance.

    Args:
      x: Input of a layer, [..., N], concrete.
      y: Cotangent of its output, [..., M], with the same leading axes.
      noise_ratio: Noise that the sketch may add, above 0.
      kind: Kind of the sketch, as in `Sketch`. For ``"stratified"`` and ``"winner_take_all"`` the
        variance may rise with p in places; the p returned satisfies the bound.

    Returns:
      p, from 1 to B; B if no sketch is good enough.

    Raises:
      ValueError: If ``noise_ratio`` is not above 0; as `sketch_variance` and `minibatch_variance`.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> x = jax.random.normal(jax.random.key(0), (1000, 8))
      >>> y = jax.random.normal(jax.random.key(1), (1000, 4))
      >>> kinds = ("rows", "rademacher")
      >>> [lro.layers.choose_sketch_size(x, y, noise_ratio=4.0, kind=kind) for kind in kinds]
      [200, 248]

    Reference:
      Bershatsky et al., 2022, https://arxiv.org/abs/2201.13195, Section 3, for the ratio.
    """
    if not noise_ratio > 0:
        raise ValueError(f"noise_ratio={noise_ratio!r} must be above 0.")
    count = math.prod(x.shape[:-1])
    allowed = noise_ratio * float(minibatch_variance(x, y))
    if kind == "rows":
        return max(1, math.ceil(count / (1 + noise_ratio) - 1e-9))
    low, high = 1, count
    while low < high:
        middle = (low + high) // 2
        if float(sketch_variance(x, y, middle, kind)) <= allowed:
            high = middle
        else:
            low = middle + 1
    return low


def _rows(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x.shape[:-1] != y.shape[:-1] or x.ndim == 0:
        raise ValueError(f"x {x.shape} and y {y.shape} must be [..., N] and [..., M].")
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    count = math.prod(x.shape[:-1])
    flat = lambda v: v.astype(dtype).reshape(count, v.shape[-1])
    return flat(x), flat(y)


def _norms(x: jax.Array, y: jax.Array) -> _Norms:
    x_rows, y_rows = jnp.sum(x**2, axis=1), jnp.sum(y**2, axis=1)
    return _Norms(jnp.sum(x_rows), jnp.sum(y_rows), _squared_product(x, y), x_rows * y_rows)


def _squared_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """‖XᵀY‖²."""
    return jnp.sum(jnp.matmul(x.T, y, precision=jax.lax.Precision.HIGHEST) ** 2)


def _stratified_variance(x: jax.Array, y: jax.Array, rows: jax.Array, size: int) -> jax.Array:
    """By [b, b] products of the rows of a stratum, or by [N, M] ones if those are smaller."""
    least, larger = divmod(len(x), size)
    sizes = np.full(size, least) + (np.arange(size) < larger)
    position = np.arange(sizes.max())
    starts = np.cumsum(sizes) - sizes
    inside = position < sizes[:, None]
    index = np.where(inside, starts[:, None] + position, 0)
    x, y = (jnp.where(inside[..., None], v[index], 0) for v in (x, y))  # [p, b, N], [p, b, M]
    if len(position) ** 2 <= x.shape[-1] * y.shape[-1]:
        product = lambda v: jnp.einsum("kin,kjn->kij", v, v, precision=jax.lax.Precision.HIGHEST)
        squares = jnp.sum(product(x) * product(y))
    else:
        squares = jnp.sum(jax.lax.map(lambda pair: _squared_product(*pair), (x, y)))
    return jnp.sum(np.repeat(sizes, sizes) * rows) - squares
