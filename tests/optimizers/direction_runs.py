"""Runs of transformations under direction rules, and the rules in float64."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

MODES = ("grams", "cautious")

_update = jax.jit(lambda tx, *args: tx.update(*args), static_argnums=0)


def updates_of(
    tx: optax.GradientTransformation,
    gradients: Sequence[Any],
    params: Any = None,
    *,
    jitted: bool = True,
) -> list[Any]:
    """The updates for a list of gradients."""
    state = tx.init(gradients[0] if params is None else params)
    step = functools.partial(_update, tx) if jitted else tx.update
    found = []
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        found.append(jax.tree.map(np.asarray, updates))
    return found


def normal(shape: tuple[int, ...], count: int = 6, seed: int = 0) -> list[jax.Array]:
    """Gradients with some zeros."""
    drawn = np.random.default_rng(seed).normal(size=(count, *shape))
    return list(jnp.asarray(np.where(np.abs(drawn) < 0.1, 0, drawn), jnp.float32))


def reference(
    update: np.ndarray, gradient: np.ndarray, mode: str, scale: str = "none"
) -> np.ndarray:
    """The rule of the specification, for additive updates of one weight, in float64."""
    u, g = np.float64(update), np.float64(gradient)
    if mode == "grams":
        return np.where(g > 0, -np.abs(u), np.where(g < 0, np.abs(u), 0))
    phi = [1.0 if a * b < 0 else 0.0 for a, b in zip(u.ravel(), g.ravel(), strict=True)]
    factors = {
        "mean_clamped": 1 / max(sum(phi) / len(phi), 1e-3),
        "count_plus_one": len(phi) / (sum(phi) + 1),
        "none": 1.0,
    }
    return u * np.reshape(phi, u.shape) * factors[scale]
