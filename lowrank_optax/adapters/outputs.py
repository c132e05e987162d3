"""A layer's output with several adapters, each with its strength."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.base import Adapter, Arrays
from lowrank_optax.adapters.operands import Operand


class Part(NamedTuple):
    """One adapter in one call of a layer.

    Attributes:
      method: What it is.
      p: Its arrays.
      strength: What its change is multiplied by; None if it is switched off.
      key: For dropout.
    """

    method: Adapter
    p: Arrays
    strength: float | None = 1.0
    key: jax.Array | None = None


def adapted_output(
    parts: Sequence[Part],
    x: Operand,
    y: jax.Array,
    *,
    weight: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    r"""The output with all adapters: :math:`y + \sum_i s_i (y_i - y)`.

    :math:`y` is the output without any, which a method that changed the weights gives back.

    Args:
      parts: The adapters.
      x: The layer's input.
      y: Its own output ``[..., d_out]``.
      weight: Its weight ``[d_in, d_out]``.
      bias: Its bias ``[d_out]``.
    """
    for part in parts:
        if part.strength is None:
            y = part.method.before(part.p, x, y)
    active = [part for part in parts if part.strength is not None]
    apply = lambda part, y: part.method.apply(part.p, x, y, weight=weight, bias=bias, key=part.key)
    if len(active) == 1 and active[0].strength == 1:
        return apply(active[0], y)
    # Each changes the layer's own output; in float32 their differences lose nothing.
    exact = y.astype(jnp.float32)
    changes = []
    for part in active:
        before = part.method.before(part.p, x, exact)
        changes.append(part.strength * (apply(part, exact) - before))
        y = part.method.before(part.p, x, y)
    return sum(changes, y.astype(jnp.float32)).astype(y.dtype)
