"""The figure of the page on extrapolation: how large steps may be, and a game of two players."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro

COLOURS = {"none": "0.55", "same": "#3c6e9f", "past_global": "#c0712a"}
LABELS = {"none": "gradient descent", "same": "same", "past_global": "past"}
RATIOS = np.array([0.02, 0.06, 0.1, 0.13, 0.2, 0.35, 0.5, 0.75, 1.0])


def descend(loss: Any, variant: str, rate: Any, inner: Any, start: Any, steps: int) -> Any:
    """The weights of gradient descent after each step."""
    f = lro.extrapolated_value_and_grad(loss, variant, inner)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        _, gradient, state = f(params, state)
        params = jax.tree.map(lambda w, g: w - rate * g, params, gradient)
        return (params, state), params

    return jax.lax.scan(step, (start, f.init(start)), length=steps)[1]


@jax.jit
def found_limits(ratios: jax.Array) -> dict[str, jax.Array]:
    """The largest step that does not run away on a parabola, by bisection on 2000 steps."""

    def limit(variant: str, ratio: jax.Array) -> jax.Array:
        def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> Any:
            low, high = interval
            x = (low + high) / 2
            path = descend(lambda w: w**2 / 2, variant, x, ratio * x, jnp.ones(()), 2000)
            away = ~(jnp.abs(path[-1]) < 1)
            return jnp.where(away, low, x), jnp.where(away, x, high)

        return jax.lax.fori_loop(0, 12, halve, (jnp.zeros(()), jnp.full((), 10.0)))[0]

    return {v: jax.vmap(lambda r, v=v: limit(v, r))(ratios) for v in ("same", "past_global")}


def extrapolation(figure: Any) -> None:
    """Stability limits by formula and as found; the distance from the solution of a game."""
    limits, distances = figure.subplots(1, 2)
    r = np.linspace(0.001, 1, 2000)
    below = (1 - np.sqrt(np.maximum(1 - 8 * r, 0))) / (2 * r)
    formulas = {"same": np.where(r > 1 / 8, 1 / r, below), "past_global": 2 / (1 + 2 * r)}
    found = found_limits(jnp.asarray(RATIOS, jnp.float32))
    limits.axhline(2, color=COLOURS["none"], label=LABELS["none"])
    for variant, formula in formulas.items():
        limits.plot(r, formula, color=COLOURS[variant], label=LABELS[variant])
        limits.plot(RATIOS, found[variant], "o", color=COLOURS[variant], markersize=4)
    limits.set_xlabel("inner learning rate / learning rate")
    limits.set_ylabel("limit of learning rate × curvature")
    limits.set_ylim(0, 8.5)

    hold = jax.lax.stop_gradient
    game = lambda p: p["x"] * hold(p["y"]) - hold(p["x"]) * p["y"]
    start = {"x": jnp.ones(()), "y": jnp.ones(())}
    for variant, label in LABELS.items():
        path = descend(game, variant, 0.3, 0.3, start, 150)
        distances.semilogy(np.hypot(path["x"], path["y"]), color=COLOURS[variant], label=label)
    distances.set_xlabel("step")
    distances.set_ylabel("distance from the solution of x·y")
    distances.set_ylim(1e-4, 1e3)
    for axes in (limits, distances):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
