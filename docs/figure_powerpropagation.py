"""The figure of the page on Powerpropagation: sparse regression, and what pruning it costs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro

ALPHAS = (1.0, 1.25, 1.5, 1.75)
SAMPLES, FEATURES, TRUE, SEEDS, STEPS = 80, 100, 8, 16, 6000
KEPT = np.arange(1, FEATURES + 1)
COLOURS = ("0.55", "#3c6e9f", "#c0712a", "#4b8a4a")


def powerpropagation(figure: Any) -> None:
    """Sizes of the weights after training, and test errors after pruning."""
    sizes, errors = figure.subplots(1, 2)
    draws = [problem(seed) for seed in range(SEEDS)]
    stacked = [jnp.asarray(np.stack(x), jnp.float32) for x in zip(*draws, strict=True)]
    for alpha, colour in zip(ALPHAS, COLOURS, strict=True):
        each, error = jax.vmap(partial(regression, alpha))(*stacked)
        style = {"color": colour, "label": f"α = {alpha:g}" + " (plain)" * (alpha == 1)}
        sizes.plot(KEPT, np.mean(each, axis=0), **style)
        errors.plot(KEPT[1:], np.mean(error, axis=0)[1:], **style)
    sizes.axvline(TRUE, color="0.8", linewidth=1, zorder=0)
    sizes.set_yscale("log")
    sizes.set_ylim(1e-5, 2)
    sizes.set_xlabel("weights, from the largest")
    sizes.set_ylabel("size |w|")
    sizes.legend(fontsize=8, frameon=False, loc="lower left")
    errors.axvline(TRUE, color="0.8", linewidth=1, zorder=0)
    errors.set_yscale("log")
    errors.set_xlabel("weights kept, of 100")
    errors.set_ylabel("test error")
    for axes in (sizes, errors):
        axes.spines[["top", "right"]].set_visible(False)


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, the true weights (8 of 100 are ±1), and those that training starts from."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(SAMPLES, FEATURES))
    weights = np.zeros(FEATURES)
    weights[random.choice(FEATURES, TRUE, replace=False)] = random.choice([-1, 1], TRUE)
    return x, weights, 0.05 * random.normal(size=FEATURES)


@partial(jax.jit, static_argnums=0)
def regression(
    alpha: float, x: jax.Array, true: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sizes from the largest after gradient descent, and expected errors with so many kept."""
    weights_of = partial(lro.layers.powerprop, alpha=alpha, where="")
    y = x @ true
    loss = lambda theta: 0.5 * jnp.mean((x @ weights_of(theta) - y) ** 2)
    step = lambda theta, _: (theta - 0.05 * jax.grad(loss)(theta), None)
    theta = lro.layers.powerprop_inverse(start, alpha, where="")
    weights = weights_of(jax.lax.scan(step, theta, length=STEPS)[0])

    order = jnp.argsort(-jnp.abs(weights))
    weights, true = weights[order], true[order]
    # A true weight is lost until it is kept, and missed by the difference from then on.
    errors = jnp.sum(true**2) + jnp.cumsum((weights - true) ** 2 - true**2)
    return jnp.abs(weights), errors
