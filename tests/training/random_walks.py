"""Scale-invariant weights under random gradients: what an optimizer makes of their norm."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.training import Measurements, measurements

SIZE = 500


def random_walk(
    tx: optax.GradientTransformation, norm: float, steps: int, seed: int = 0
) -> tuple[Measurements, Any]:
    """Trains a vector of a given norm; the history, and the weights and state they end with.

    Gradients are random, at right angles to the weights, and as long as the root of `SIZE` on the
    unit sphere: their norm falls as that of the weights grows.
    """
    start = np.random.default_rng(seed).normal(size=SIZE)
    params = {"kernel": jnp.asarray(start / np.linalg.norm(start) * norm, jnp.float32)}

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        params, state = carry
        w, g = params["kernel"], jax.random.normal(key, (SIZE,))
        g -= w * (g @ w) / (w @ w)
        g *= jnp.sqrt(SIZE) / (jnp.linalg.norm(g) * jnp.linalg.norm(w))
        updates, state = tx.update({"kernel": g}, state, params)
        return (optax.apply_updates(params, updates), state), state

    keys = jax.random.split(jax.random.key(seed), steps)
    carry = (params, tx.init(params))
    carry, states = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(carry)
    return measurements(states), carry


def late(history: Measurements, name: str) -> float:
    """The mean of a number over the second half of a run."""
    values = np.asarray(history["all"][name])
    return float(values[len(values) // 2 :].mean())
