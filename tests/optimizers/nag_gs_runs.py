"""Short runs of an optimizer, compiled whole."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def final(tx: Any, gradient: Callable[[Any], Any], start: Any, steps: int) -> tuple[Any, Any]:
    """Parameters and state after so many steps."""

    def body(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (start, tx.init(start))
    return jax.jit(lambda c: jax.lax.scan(body, c, length=steps)[0])(carry)


def updates_of(tx: Any, gradients: Any) -> Any:
    """All updates for gradients ``[steps, ...]``; parameters stay where they are."""
    params = jax.tree.map(lambda g: g[0], gradients)
    body = lambda state, g: tx.update(g, state, params)[::-1]
    return jax.jit(lambda gs: jax.lax.scan(body, tx.init(params), gs)[1])(gradients)


def normal(shape: Sequence[int], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=tuple(shape)), jnp.float32)
