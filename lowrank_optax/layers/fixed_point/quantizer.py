"""Quantization to fixed point with a trainable binary point, and its straight-through gradients."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from lowrank_optax.layers.fixed_point.formats import FixedPointFormat

LOG_2 = math.log(2)
MOST_EXPONENT = 126  # of a step: its inverse is a normal number, too


def quantize_fixed_point(
    x: jax.Array, integer_bits: ArrayLike, format: FixedPointFormat
) -> jax.Array:
    r"""Round to fixed-point numbers; the position of the binary point is differentiable.

    With :math:`I` the rounded ``integer_bits``, :math:`W` the format's bits and the step
    :math:`\delta = 2^{I - W}`, the result is :math:`y = n \delta` with the integer
    :math:`n = \mathrm{overflow}(\mathrm{round}(x / \delta))`.

    Gradients pass straight through the rounding of :math:`x` and of ``integer_bits``:

    .. math::
      \frac{\partial y}{\partial x} = 1, \quad
      \frac{\partial y}{\partial I} = (y - x) \ln 2 \quad \text{in the range}, \qquad
      \frac{\partial y}{\partial x} = 0, \quad
      \frac{\partial y}{\partial I} = y \ln 2 \quad \text{outside}.

    The range ends half a step beyond the outermost numbers with rounding to the nearest, and where
    rounding leaves them otherwise. The two modes that wrap count as never overflowing: the first
    pair is used everywhere, with :math:`y` before the overflow.

    Args:
      x: Numbers of any shape and floating-point dtype. NaN becomes 0, infinity saturates.
      integer_bits: Position :math:`I` of the binary point, real, with the sign bit; it may be
        negative or above ``bits``. A scalar, or an array that broadcasts against ``x``, such as
        ``[channels]``.
      format: Word length and modes.

    Returns:
      The rounded numbers, shape and dtype of ``x``. Where a traced ``integer_bits`` is not finite
      they are NaN.

    Raises:
      TypeError: If ``x`` is not floating-point, or ``format`` not a `FixedPointFormat`.
      ValueError: If ``integer_bits`` is not finite, puts the step outside of ``2**-126`` to
        ``2**126`` or does not broadcast to ``x``; or the dtype of ``x`` holds too few bits.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> x = jnp.array([-3.0, -0.125, 0.375, 1.9])
      >>> number = lro.layers.FixedPointFormat(4)  # with 2 integer bits: steps of 1/4
      >>> print(lro.layers.quantize_fixed_point(x, 2.0, number))
      [-2.    0.    0.5   1.75]

    Reference:
      Dai et al., 2024, https://arxiv.org/abs/2401.17544; the gradients are those of Jain et al.,
      2019, https://arxiv.org/abs/1903.08066, for a scale that is a power of two.
    """
    if not isinstance(format, FixedPointFormat):
        raise TypeError(f"format={format!r} must be a FixedPointFormat.")
    x = jnp.asarray(x)
    check_dtype("x", x.dtype, format)
    integer_bits = jnp.asarray(integer_bits, _work_dtype(x.dtype))
    check_integer_bits("integer_bits", integer_bits, format)
    try:
        fits = jnp.broadcast_shapes(x.shape, integer_bits.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"integer_bits {integer_bits.shape} does not broadcast to x {x.shape}.")
    return _compiled(x, integer_bits, format)


def check_dtype(name: str, dtype: Any, format: FixedPointFormat) -> None:
    """Raise an error if a dtype does not hold all numbers of a format."""
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point, not {dtype}.")
    digits = jnp.finfo(dtype).nmant + 1
    most = digits if digits >= 24 else digits + format.signed
    if format.bits > most:
        raise ValueError(
            f"{name} is {dtype}, which holds fixed-point numbers of {most} bits at most, not of "
            f"{format.bits}: use fewer bits or a wider dtype."
        )


def check_integer_bits(name: str, integer_bits: Any, format: FixedPointFormat) -> None:
    """Raise ValueError if a position is not finite or the step not normal; traced ones pass."""
    if isinstance(integer_bits, jax.core.Tracer):
        return
    values = np.asarray(integer_bits, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name} must be finite, not {_short(values)}: choose it with choose_integer_bits, or "
            "calibrate the model."
        )
    exponents = np.rint(values) - format.bits
    if (abs(exponents) > MOST_EXPONENT).any():
        raise ValueError(
            f"{name}={_short(values)} with {format.bits} bits: the step 2**(I - bits) and its "
            "inverse must be normal numbers of float32, 2**-126 to 2**126."
        )


def _short(values: np.ndarray) -> str:
    return np.array2string(values, threshold=6)


def _work_dtype(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def step_size(integer_bits: jax.Array, format: FixedPointFormat) -> jax.Array:
    """The exact power of two ``2**(round(I) - bits)``, NaN where ``I`` is not finite."""
    return _steps(integer_bits, format, 1)


def _steps(integer_bits: jax.Array, format: FixedPointFormat, sign: int) -> jax.Array:
    """The step, or its inverse if the sign of the exponent is -1."""
    finite = jnp.isfinite(integer_bits)
    exponent = jnp.round(jnp.where(finite, integer_bits, 0)) - format.bits
    exponent = jnp.clip(exponent, -MOST_EXPONENT, MOST_EXPONENT).astype(jnp.int32)
    # By the bits of float32: exp2, pow and ldexp, which calls it, are not exact on accelerators.
    power = jax.lax.bitcast_convert_type((127 + sign * exponent) << 23, jnp.float32)
    return jnp.where(finite, power, jnp.nan).astype(integer_bits.dtype)


class _Parts(NamedTuple):
    """What one number's quantization and its gradients are made of."""

    step: jax.Array
    integer: jax.Array
    target: jax.Array  # what the numbers inside are pulled to, in steps
    inside: jax.Array


def _parts(x: jax.Array, integer_bits: jax.Array, format: FixedPointFormat) -> _Parts:
    step = step_size(integer_bits, format)
    t = x * _steps(integer_bits, format, -1)  # a division is not exact on accelerators
    if format.ones is not None:
        rounded = integer = _nearest(t, format)
    else:
        rounded = _round(t, format)
        integer = _overflow(rounded, format)
    integer = jnp.where(jnp.isinf(t), _at_infinity(t, format), integer)
    integer = jnp.where(jnp.isnan(t), 0, integer)
    wraps = format.overflow in ("WRAP", "WRAP_SM")
    return _Parts(step, integer, rounded if wraps else integer, _inside(t, rounded, format))


def _round(t: jax.Array, format: FixedPointFormat) -> jax.Array:
    if format.rounding == "TRN":
        return jnp.floor(t)
    # The fraction of a magnitude is exact; t - floor(t) is not for a t slightly below zero.
    size = jnp.abs(t)
    whole = jnp.floor(size)
    if format.rounding != "TRN_ZERO":
        fraction = size - whole
        ties_away = {
            "RND": t > 0,
            "RND_CONV": whole % 2 == 1,
            "RND_ZERO": jnp.zeros_like(t, bool),
            "RND_INF": jnp.ones_like(t, bool),
            "RND_MIN_INF": t < 0,
        }[format.rounding]
        whole += (fraction > 0.5) | ((fraction == 0.5) & ties_away)
    return jnp.where(t < 0, -whole, whole)


def _overflow(n: jax.Array, format: FixedPointFormat) -> jax.Array:
    low, high = format.smallest, format.largest
    if format.overflow in ("SAT", "SAT_SYM"):
        return jnp.clip(n, low, high)
    if format.overflow == "SAT_ZERO":
        return jnp.where((n < low) | (n > high), 0, n)
    # Exact: a division by a power of two, and a difference that is a multiple of n's last bit.
    size = 2.0**format.bits
    turns = jnp.floor(n / size)
    wrapped = n - size * turns
    if not format.signed:
        return wrapped
    wrapped = jnp.where(wrapped > high, wrapped - size, wrapped)
    if format.overflow == "WRAP_SM":
        # The lowest bit that is lost becomes the sign; where it was not, all bits are inverted.
        wrapped = jnp.where((turns % 2 == 1) != (wrapped < 0), -1 - wrapped, wrapped)
    return wrapped


def _at_infinity(t: jax.Array, format: FixedPointFormat) -> jax.Array:
    ends = jnp.where(t > 0, format.largest, format.smallest)
    return jnp.zeros_like(t) if format.overflow == "SAT_ZERO" else ends.astype(t.dtype)


def _nearest(t: jax.Array, format: FixedPointFormat) -> jax.Array:
    integers = format.integers()
    middles = (integers[1:] + integers[:-1]) / 2
    place = jnp.searchsorted(jnp.asarray(middles, t.dtype), t, side="right")
    return jnp.asarray(integers, t.dtype)[place]


def _inside(t: jax.Array, rounded: jax.Array, format: FixedPointFormat) -> jax.Array:
    if format.overflow in ("WRAP", "WRAP_SM"):
        return jnp.isfinite(t)
    if format.overflow == "SAT_ZERO":
        return (rounded >= format.smallest) & (rounded <= format.largest)
    # Differences: the ends with their halves need a bit more than the dtype may have.
    above, below = t - format.largest, format.smallest - t
    if format.rounding == "TRN":
        return (below <= 0) & (above < 1)
    if format.rounding == "TRN_ZERO":
        return (below < 1) & (above < 1)
    return (below <= 0.5) & (above <= 0.5)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantize(x: jax.Array, integer_bits: jax.Array, format: FixedPointFormat) -> jax.Array:
    parts = _parts(x.astype(integer_bits.dtype), integer_bits, format)
    y = parts.integer * parts.step
    return jnp.where(y == 0, 0, y).astype(x.dtype)  # +0, never -0


def _forward(x: jax.Array, integer_bits: jax.Array, format: FixedPointFormat) -> Any:
    return _quantize(x, integer_bits, format), (x, integer_bits)


def _backward(format: FixedPointFormat, saved: Any, cotangent: jax.Array) -> Any:
    x, integer_bits = saved
    wide = x.astype(integer_bits.dtype)
    step, integer, target, inside = _parts(wide, integer_bits, format)
    g = cotangent.astype(integer_bits.dtype)
    slope = LOG_2 * jnp.where(inside, target * step - wide, integer * step)
    by_point = _sum_to(g * slope, integer_bits.shape)
    return jnp.where(inside, cotangent, 0), by_point


_quantize.defvjp(_forward, _backward)
_compiled = jax.jit(_quantize, static_argnums=2)  # outside of jit, some thirty operations


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sum over the axes along which an array of this shape was broadcast."""
    lead = x.ndim - len(shape)
    axes = [*range(lead), *(lead + i for i, size in enumerate(shape) if size == 1)]
    return x.sum(axis=axes).reshape(shape)
