"""The power of an array that is Powerpropagation, its inverse and its derivative."""

from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Alpha: TypeAlias = float | jax.Array
"""A Python number, or a scalar, which may be traced (on a schedule)."""


def power(theta: jax.Array, alpha: Alpha) -> jax.Array:
    """The weights ``θ·|θ|^(α - 1)`` of one array, in its dtype."""
    if isinstance(alpha, int | float) and alpha == 1:
        return theta
    return _power(theta, jnp.asarray(alpha))


def root(w: jax.Array, alpha: Alpha) -> jax.Array:
    """The inverse of `power`; 0 has the derivative 0, instead of an infinite one."""
    if isinstance(alpha, int | float) and alpha == 1:
        return w
    wide, alpha = _widened(w, jnp.asarray(alpha))
    return (wide * _nonzero(wide) ** (1 / alpha - 1)).astype(w.dtype)


def slope(theta: jax.Array, alpha: Alpha) -> jax.Array:
    """The derivative ``α·|θ|^(α - 1)``, float32 or wider; its own derivative is finite too."""
    wide, alpha = _widened(theta, jnp.asarray(alpha))
    at_zero = jnp.where(alpha == 1, 1.0, 0.0).astype(wide.dtype)
    return jnp.where(wide == 0, at_zero, alpha * _nonzero(wide) ** (alpha - 1))


@partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
def _power(theta: jax.Array, alpha: jax.Array) -> jax.Array:
    """The power; backward computes the slope anew, and so keeps ``theta`` alone."""
    return _power_with_rule(theta, alpha)


@jax.custom_jvp
def _power_with_rule(theta: jax.Array, alpha: jax.Array) -> jax.Array:
    wide, alpha = _widened(theta, alpha)
    # Not sign·|θ|^α: this is θ to the last bit for a traced alpha of 1.
    return (wide * jnp.abs(wide) ** (alpha - 1)).astype(theta.dtype)


@partial(_power_with_rule.defjvp, symbolic_zeros=True)
def _power_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    theta, alpha = primals
    w = _power_with_rule(theta, alpha)
    total = jnp.zeros_like(w, _widened(theta, alpha)[0].dtype)
    towards_theta, towards_alpha = tangents
    if not isinstance(towards_theta, jax.custom_derivatives.SymbolicZero):
        total += slope(theta, alpha) * towards_theta
    if not isinstance(towards_alpha, jax.custom_derivatives.SymbolicZero):
        wide, exponent = _widened(theta, alpha)
        safe = _nonzero(wide)
        total += wide * safe ** (exponent - 1) * jnp.log(safe) * towards_alpha
    return w, total.astype(w.dtype)


def _nonzero(x: jax.Array) -> jax.Array:
    """Sizes, with 1 for 0: powers of it have finite derivatives."""
    return jnp.where(x == 0, 1, jnp.abs(x))


def _widened(theta: jax.Array, alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.promote_types(theta.dtype, jnp.float32)
    return theta.astype(dtype), alpha.astype(dtype)
