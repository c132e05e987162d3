"""A conditional that is decided at once where its predicate is known."""

from collections.abc import Callable
from typing import TypeVar

import jax

T = TypeVar("T")


def branch(predicate: jax.Array, on_true: Callable[[], T], on_false: Callable[[], T]) -> T:
    """``jax.lax.cond``; outside of a trace, where that would be compiled at each call, an ``if``.

    Args:
      predicate: A bool scalar.
      on_true: What is computed if it is true.
      on_false: What is computed otherwise, with results of the same types.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> pick = lambda x: branch(x > 0, lambda: x, lambda: -x)
      >>> print(pick(jnp.array(-2.0)), jax.jit(pick)(jnp.array(-2.0)))
      2.0 2.0
    """
    if isinstance(predicate, jax.core.Tracer):
        return jax.lax.cond(predicate, on_true, on_false)
    return on_true() if predicate else on_false()
