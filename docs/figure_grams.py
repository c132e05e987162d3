"""The figure of the page on direction rules: a quadratic without noise, and with it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

CURVATURES = jnp.geomspace(0.01, 1, 50)
RUNS = 16
OPTIMIZERS: dict[str, tuple[Callable[[float], Any], str]] = {
    "Adam": (optax.adam, "-"),
    "Grams": (lro.grams, "-"),
    "cautious AdamW": (lro.cautious_adamw, "--"),
    "cautious, not rescaled": (lambda rate: lro.cautious_adamw(rate, scale="none"), ":"),
}


def grams(figure: Any) -> None:
    """Losses on a quadratic."""
    exact, noisy = figure.subplots(1, 2)
    for name, (make, style) in OPTIMIZERS.items():
        exact.semilogy(losses(make(1e-2), noise=0.0, steps=500), style, label=name)
        noisy.semilogy(losses(make(3e-3), noise=1.0, steps=4000), style, label=name)
    exact.set_ylim(1e-30, 1e2)
    exact.set_ylabel("loss, exact gradients, rate 0.01")
    noisy.set_ylabel("loss, noise of variance 1, rate 0.003")
    noisy.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"], minor=False)
    noisy.set_yticks([], minor=True)
    for axes, where in ((exact, "lower left"), (noisy, "upper right")):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc=where)


def losses(tx: optax.GradientTransformation, noise: float, steps: int) -> np.ndarray:
    """Losses ``[steps]`` from a start at ones, the mean of `RUNS` runs with noise of their own."""

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        gradient = CURVATURES * params + noise * jax.random.normal(key, params.shape)
        updates, state = tx.update(gradient, state)
        params = optax.apply_updates(params, updates)
        return (params, state), 0.5 * jnp.sum(CURVATURES * params**2)

    def run(key: jax.Array) -> jax.Array:
        start = jnp.ones(CURVATURES.shape)
        return jax.lax.scan(step, (start, tx.init(start)), jax.random.split(key, steps))[1]

    keys = jax.random.split(jax.random.key(0), RUNS)
    return np.asarray(jax.jit(jax.vmap(run))(keys)).mean(axis=0)
