"""The figure of the page on randomized linears: measured against stated noise, by kind."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro
from lowrank_optax.layers import Sketch

SHAPE = 256, 24, 16  # rows, inputs, outputs
FRACTIONS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
MEASURED = (0.1, 0.5)
COLOURS = {
    "rows": "#3c6e9f",
    "stratified": "#4b8a4a",
    "norm_weighted": "#8a4b86",
    "winner_take_all": "#c0712a",
    "srht": "0.45",
    "rademacher": "0.6",
    "gaussian": "0.2",
}

DASHES = {"gaussian": "--", "srht": "--"}  # where they lie on others


def randomized_linear(figure: Any) -> None:
    """The noise by fraction: of rows of one size, and of rows of which few are large."""
    for axes, spread in zip(figure.subplots(1, 2), (0.0, 1.0), strict=True):
        x, y = rows_of(spread)
        minibatch = float(lro.layers.minibatch_variance(x, y))
        for kind, colour in COLOURS.items():
            stated = [
                float(lro.layers.sketch_variance(x, y, int(f * len(x)), kind)) for f in FRACTIONS
            ]
            measured = [simulated(x, y, Sketch(kind, fraction=f)) for f in MEASURED]
            axes.plot(
                FRACTIONS,
                np.array(stated) / minibatch,
                color=colour,
                linestyle=DASHES.get(kind, "-"),
            )
            axes.plot(MEASURED, np.array(measured) / minibatch, ".", color=colour, label=kind)
        axes.axhline(1, color="0.8", linestyle=":")
        axes.set_yscale("log")
        axes.set_ylim(0.03, 60)
        axes.set_xlabel("fraction of the rows, p / B")
        axes.spines[["top", "right"]].set_visible(False)
    left, right = figure.axes
    left.set_title("rows of one size", fontsize=9)
    right.set_title("few rows are large", fontsize=9)
    left.set_ylabel("noise, over the mini-batch's")
    left.legend(fontsize=7, frameon=False, ncols=2, loc="lower left")


def rows_of(spread: float) -> tuple[jax.Array, jax.Array]:
    """Inputs whose norms are spread so, log-normally, and cotangents."""
    count, inputs, outputs = SHAPE
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (count, inputs))
    x /= jnp.linalg.norm(x, axis=1, keepdims=True)
    x *= jnp.exp(spread * jax.random.normal(keys[1], (count, 1)))
    return x, jax.random.normal(keys[2], (count, outputs))


@partial(jax.jit, static_argnames="sketch")
def simulated(x: jax.Array, y: jax.Array, sketch: Sketch) -> jax.Array:
    """The mean squared error of 300 sketched gradients."""
    kernel = jnp.zeros((x.shape[1], y.shape[1]))

    def error(key: jax.Array) -> jax.Array:
        linear = lambda kernel: lro.layers.randomized_linear(x, kernel, key=key, sketch=sketch)
        return jnp.sum((jax.vjp(linear, kernel)[1](y)[0] - x.T @ y) ** 2)

    return jnp.mean(jax.lax.map(error, jax.random.split(jax.random.key(1), 300), batch_size=50))
