"""Where the binary point starts: from the range of numbers, or from their rounding errors."""

import functools
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.fixed_point.formats import FixedPointFormat
from lowrank_optax.layers.fixed_point.quantizer import (
    check_dtype,
    quantize_fixed_point,
    step_size,
)

StartRule: TypeAlias = Literal["mse", "max"]
"""``"mse"`` for the least squared rounding error, ``"max"`` to hold the largest number."""

CANDIDATES = np.arange(-32, 33)
SQUARES, OUTSIDE, COUNT = range(3)


def choose_integer_bits(
    x: jax.Array,
    format: FixedPointFormat,
    rule: StartRule = "mse",
    *,
    per_channel: bool = False,
) -> jax.Array:
    """Choose the position of the binary point for given numbers, -32 to 32.

    Args:
      x: Numbers ``[..., channels]``, such as weights or a batch of activations.
      format: Word length and modes.
      rule: ``"mse"`` for the position with the least mean squared rounding error; ``"max"`` for the
        smallest one whose largest number is at least the largest magnitude. It is 1 where all
        numbers are zero.
      per_channel: Whether each index of the last axis gets its own.

    Returns:
      The positions, float32 ``[]`` or ``[channels]``.

    Raises:
      TypeError: If ``x`` is not floating-point.
      ValueError: If ``x`` is empty or has numbers that are not finite or too large (unless
        traced), ``rule`` is unknown, or the rule is ``"max"`` and the format has one signed bit,
        whose largest number is zero.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> number = lro.layers.FixedPointFormat(8)
      >>> print(lro.layers.choose_integer_bits(jnp.array([0.1, -1.5]), number, "max"))
      2.0
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating-point, not {x.dtype}.")
    check_rule(rule, format)
    if x.size == 0:
        raise ValueError(f"x has shape {x.shape} and no numbers to choose by.")
    shape = x.shape[-1:] if per_channel else ()
    found = range_statistics(x, shape, format)
    check_finite("x", found, rule)
    return best_position(found, rule)


def check_rule(rule: StartRule, format: FixedPointFormat) -> None:
    """Raise ValueError if a rule is unknown, or does nothing for a format."""
    if rule not in get_args(StartRule):
        raise ValueError(f"rule={rule!r} must be 'mse' or 'max'.")
    if rule == "max" and format.largest == 0:
        raise ValueError("rule='max' needs a largest number above zero: use 2 bits, or 'mse'.")


@functools.partial(jax.jit, static_argnums=(1, 2))
def range_statistics(x: jax.Array, shape: tuple[int, ...], format: FixedPointFormat) -> jax.Array:
    """What `best_position` needs to know of some numbers: it adds up over calls and batches.

    Args:
      x: Numbers; quantized in float32.
      shape: ``()``, or ``[channels]`` for a position for each index of the last axis.
      format: Word length and modes.

    Returns:
      float32 ``[*shape, candidates, 3]``: squared errors, numbers outside of the range, numbers.
    """
    check_dtype("x", jnp.float32, format)
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - len(shape)))
    # The magnitude decides, also for the side of the negative numbers that reaches further.
    size = jnp.abs(x) if format.signed else x
    if includes_relu(format):
        x = jnp.maximum(x, 0)  # zero at any position: the others decide

    def of(position: jax.Array) -> jax.Array:
        error = quantize_fixed_point(x, position, format) - x
        outside = size > format.largest * step_size(position, format)
        sums = [error**2, outside.astype(jnp.float32), jnp.ones_like(x)]
        return jnp.stack([each.sum(axes) for each in sums], axis=-1)

    found = jax.lax.map(of, jnp.asarray(CANDIDATES, jnp.float32))
    return jnp.moveaxis(found, 0, -2)


def includes_relu(format: FixedPointFormat) -> bool:
    """Whether a format makes all negative numbers zero."""
    return not format.signed and format.overflow.startswith("SAT")


def check_finite(name: str, statistics: Any, rule: StartRule) -> None:
    """Raise ValueError if numbers were not finite or too large; traced statistics pass."""
    if isinstance(statistics, jax.core.Tracer):
        return
    if not np.isfinite(statistics).all():
        raise ValueError(f"{name} has numbers that are not finite, or whose squares are not.")
    if rule == "max" and np.asarray(statistics)[..., -1, OUTSIDE].any():
        raise ValueError(f"{name} has numbers that {CANDIDATES[-1]} integer bits do not hold.")


def best_position(statistics: jax.Array, rule: StartRule) -> jax.Array:
    """The positions, float32, of statistics ``[..., candidates, 3]``."""
    squares, outside = statistics[..., SQUARES], statistics[..., OUTSIDE]
    if rule == "max":
        index = jnp.where(outside[..., -1] > 0, len(CANDIDATES) - 1, (outside == 0).argmax(-1))
    else:
        index = squares.argmin(-1)
    found = jnp.asarray(CANDIDATES, jnp.float32)[index]
    all_zero = (squares == 0).all(-1) & (outside[..., 0] == 0)
    return jnp.where(all_zero, 1.0, found)
