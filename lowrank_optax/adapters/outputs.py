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
      method: The adapter's method.
      p: Its arrays.
      strength: Factor of its change; None if it is switched off.
      key: PRNG key for dropout.
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
    r"""The output :math:`y + \sum_i s_i \, \mathrm{branch}_i + (1 - s_i) \, \mathrm{removed}_i`.

    It is summed in float32, except where one adapter alone is active, at strength 1.

    Args:
      parts: The adapters.
      x: The layer's input.
      y: Its own output ``[..., d_out]``.
      weight: Its weight ``[d_in, d_out]``.
      bias: Its bias ``[d_out]``.
    """
    active = [part.strength for part in parts if part.strength is not None]
    dtype = y.dtype if active == [1] else jnp.float32

    def plus(total: jax.Array, strength: float, change: jax.Array | None) -> jax.Array:
        if change is None:
            return total
        change = change.astype(dtype)
        return total + (change if strength == 1 else strength * change)

    own = y.astype(dtype)
    for part in parts:
        if part.strength is None:
            own = plus(own, 1, part.method.removed(part.p, x))
    total = own
    for method, p, strength, key in parts:
        if strength is not None:
            branch = method.branch(p, x, y=own, weight=weight, bias=bias, key=key)
            total = plus(total, strength, branch)
            if strength != 1:
                total = plus(total, 1 - strength, method.removed(p, x))
    return total.astype(y.dtype)
