"""How noisy the gradient of a randomized linear is, exactly, and how noisy its mini-batch is."""

import math
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.randomized.chosen_rows import over, row_chances, winners
from lowrank_optax.layers.randomized.sketch import SketchKind
from lowrank_optax.layers.randomized.transforms import cosine_transform


class _Sizes(NamedTuple):
    """What the formulas are made of: scalars, but for the last, [B]."""

    a: jax.Array  # ‖X‖²
    c: jax.Array  # ‖Y‖²
    g: jax.Array  # ‖XᵀY‖²
    d: jax.Array  # Σ ‖x_i‖²·‖y_i‖²
    of_rows: jax.Array  # ‖x_i‖²·‖y_i‖²


def sketch_variance(x: jax.Array, y: jax.Array, size: int, kind: SketchKind) -> jax.Array:
    r"""The expected squared error of the kernel's gradient, over all draws of the sketch.

    D² = E‖(SᵀX)ᵀ(SᵀY) - XᵀY‖² (Frobenius), exactly, from a = ‖X‖², c = ‖Y‖², g = ‖XᵀY‖² and
    d = Σ_i ‖x_i‖²·‖y_i‖²::

        rows             (B - p)/(p·(B - 1)) · (B·d - g)
        stratified       Σ_k [b_k·Σ_{i in k} ‖x_i‖²·‖y_i‖² - ‖Σ_{i in k} x_i·y_iᵀ‖²], strata of b_k
        norm_weighted    (Σ_i ‖x_i‖²·‖y_i‖²/q_i - g)/p,   q_i = ‖x_i‖/Σ_j ‖x_j‖
        winner_take_all  that of p - c draws from the rows other than the c that are kept
        gaussian         (a·c + g)/p
        rademacher       (a·c + g - 2·d)/p
        srht             (B' - p)/(p·(B' - 1)) · (a·c + g - 2·d),   B' the next power of two
        dct              as rows, of the transformed X and Y

    With p = B it is 0, as `randomized_linear` is the dense layer then. No [B, B] matrix is formed.

    Args:
      x: The input, [..., N], B rows in all.
      y: The cotangent of the output, [..., M], of the same leading axes.
      size: p, the rows of the sketch.
      kind: As in `Sketch`.

    Returns:
      A scalar, float32 at least; in units of the squared gradient.

    Raises:
      ValueError: If the rows of x and y differ in number, or the kind is none of those.

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
      https://arxiv.org/abs/2201.13195. Its eq. for D² has the wrong sign before g.
    """
    x, y = _rows_of(x, y)
    if kind not in get_args(SketchKind):
        raise ValueError(
            f"kind={kind!r} must be one of {', '.join(map(repr, get_args(SketchKind)))}."
        )
    if size < 1:
        raise ValueError(f"size={size!r} must be 1 at least.")
    if size >= len(x):
        return jnp.zeros((), x.dtype)
    if kind == "dct":
        x, y = cosine_transform(x), cosine_transform(y)
    of = _sizes(x, y)
    if kind in ("rows", "dct"):
        variance = _left_out(len(x), size) * (len(x) * of.d - of.g)
    elif kind == "stratified":
        variance = _of_strata(x, y, of.of_rows, size)
    elif kind == "norm_weighted":
        variance = (jnp.sum(over(of.of_rows, row_chances(x))) - of.g) / size
    elif kind == "winner_take_all":
        variance = _of_winners(x, y, of.of_rows, size)
    elif kind == "gaussian":
        variance = (of.a * of.c + of.g) / size
    else:
        variance = of.a * of.c + of.g - 2 * of.d
        padded = 1 << (len(x) - 1).bit_length()
        variance *= 1 / size if kind == "rademacher" else _left_out(padded, size)
    return jnp.maximum(variance, 0)  # below 0 by rounding alone; NaN stays


def minibatch_variance(x: jax.Array, y: jax.Array) -> jax.Array:
    """How noisy the exact gradient XᵀY is, as a sum over B rows that are a sample themselves.

    D²_SGD = (B·d - g)/(B - 1), with the d and g of `sketch_variance`: the unbiased estimate of the
    variance of the summed gradient. A sketch that adds less than this costs little: with
    ``kind="rows"`` it adds (B - p)/p times this.

    Args:
      x: The input, [..., N], B rows in all, 2 at least.
      y: The cotangent of the output, [..., M], of the same leading axes.

    Returns:
      A scalar, float32 at least.

    Raises:
      ValueError: If the rows of x and y differ in number, or there is one alone.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> x, y = jnp.array([[1.0], [3.0]]), jnp.array([[1.0], [1.0]])  # gradients 1 and 3
      >>> print(lro.layers.minibatch_variance(x, y))  # twice the sample variance, 2
      4.0

    Reference:
      Bershatsky et al., 2022, https://arxiv.org/abs/2201.13195, Section 3.
    """
    x, y = _rows_of(x, y)
    if len(x) < 2:
        raise ValueError(f"x has {len(x)} rows; the variance among them needs 2 at least.")
    of = _sizes(x, y)
    return jnp.maximum(len(x) * of.d - of.g, 0) / (len(x) - 1)


def alignment(x: jax.Array, y: jax.Array) -> jax.Array:
    """α = ‖XᵀY‖² / (‖X‖²·‖Y‖²), from 0 to 1: the share of rank-one agreement; 0 if either is 0.

    Args:
      x: The input, [..., N].
      y: The cotangent of the output, [..., M], of the same leading axes.

    Returns:
      A scalar, float32 at least.

    Raises:
      ValueError: If the rows of x and y differ in number.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> print(lro.layers.alignment(jnp.eye(2), jnp.eye(2)))
      0.5

    Reference:
      Bershatsky et al., 2022, https://arxiv.org/abs/2201.13195, Section 3.
    """
    of = _sizes(*_rows_of(x, y))
    return over(of.g, of.a * of.c)


def _rows_of(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x.shape[:-1] != y.shape[:-1] or x.ndim == 0:
        raise ValueError(f"x {x.shape} and y {y.shape} must be [..., N] and [..., M].")
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    count = math.prod(x.shape[:-1])
    flat = lambda v: v.astype(dtype).reshape(count, v.shape[-1])
    return flat(x), flat(y)


def _sizes(x: jax.Array, y: jax.Array) -> _Sizes:
    of_x, of_y = jnp.sum(x**2, axis=1), jnp.sum(y**2, axis=1)
    of_rows = of_x * of_y
    return _Sizes(jnp.sum(of_x), jnp.sum(of_y), _squared(x, y), jnp.sum(of_rows), of_rows)


def _squared(x: jax.Array, y: jax.Array) -> jax.Array:
    """‖XᵀY‖²."""
    return jnp.sum(jnp.matmul(x.T, y, precision=jax.lax.Precision.HIGHEST) ** 2)


def _left_out(count: int, size: int) -> float:
    """What p of B distinct rows have of the variance of one."""
    return (count - size) / (size * (count - 1))


def _of_strata(x: jax.Array, y: jax.Array, of_rows: jax.Array, size: int) -> jax.Array:
    """Strata of b rows at most, by [b, b] products of rows, or [N, M] ones if those are smaller."""
    least, larger = divmod(len(x), size)
    sizes = np.full(size, least) + (np.arange(size) < larger)
    place = np.arange(sizes.max())
    starts = np.cumsum(sizes) - sizes
    inside = place < sizes[:, None]
    index = np.where(inside, starts[:, None] + place, 0)
    x, y = (jnp.where(inside[..., None], v[index], 0) for v in (x, y))  # [p, b, N]
    exact = jax.lax.Precision.HIGHEST
    if len(place) ** 2 <= x.shape[-1] * y.shape[-1]:
        grams = (jnp.einsum("kin,kjn->kij", v, v, precision=exact) for v in (x, y))
        squares = jnp.sum(next(grams) * next(grams))
    else:
        squares = jnp.sum(jax.lax.map(lambda pair: _squared(*pair), (x, y)))
    return jnp.sum(np.repeat(sizes, sizes) * of_rows) - squares


def _of_winners(x: jax.Array, y: jax.Array, of_rows: jax.Array, size: int) -> jax.Array:
    chances = row_chances(x)
    order, kept, left = winners(chances, size)
    rest = jnp.zeros(len(x), bool).at[order].set(jnp.arange(len(x)) >= kept)
    drawn = jnp.sum(jnp.where(rest, over(of_rows, chances), 0)) * left
    return (drawn - _squared(jnp.where(rest[:, None], x, 0), y)) / (size - kept)
