"""The figure of the page on NAG-GS: its spectral radius on quadratics, and what its step means."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

MU, L = 1.0, 25.0
CURVATURES = jnp.geomspace(0.01, 1.0, 20)  # of the right half
STEPS = 150


def nag_gs(figure: Any) -> None:
    """Spectral radii over the step; losses at equal numbers and at equal rates."""
    radii, losses = figure.subplots(1, 2)
    alphas = np.geomspace(0.05, 2, 400)
    for gamma, style in ((0.25, "-"), (1.0, "--"), (4.0, "-")):
        (line,) = radii.plot(alphas, radius(alphas, gamma), style, label=f"γ = {gamma:g} μ")
        best = lro.nag_gs_quadratic(MU, L, gamma)
        radii.plot(best.learning_rate, best.spectral_radius, "o", color=line.get_color())
        radii.plot(best.critical_learning_rate, 1, "x", color=line.get_color())
    radii.axhline(1, color="0.55", linewidth=0.8)
    radii.set_xscale("log")
    radii.set_ylim(0.6, 1.2)
    radii.set_xlabel("step α")
    radii.set_ylabel(f"spectral radius, κ = {L / MU:g}")
    best = lro.nag_gs_quadratic(0.01, 1.0, 0.01)
    runs = {
        "SGD 0.5, momentum 0.9": (optax.sgd(0.5, 0.9), "-"),
        "NAG-GS 0.5": (lro.nag_gs(0.5, constant_gamma=True), "-"),
        "SGD at to_heavy_ball(0.5, 1, 1)": (optax.sgd(*lro.to_heavy_ball(0.5, 1.0, 1.0)), "k:"),
        f"NAG-GS {best.learning_rate:.2f}, μ = γ = 0.01": (
            lro.nag_gs(best.learning_rate, 0.01, 0.01),
            "-",
        ),
    }
    for label, (tx, style) in runs.items():
        losses.semilogy(loss(tx), style, label=label)
    losses.set_ylim(1e-7, 1e4)
    losses.set_xlabel("steps")
    losses.set_ylabel("loss of a quadratic, κ = 100")
    for axes, where in ((radii, "lower left"), (losses, "upper right")):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc=where)


def radius(alphas: np.ndarray, gamma: float) -> np.ndarray:
    """The larger spectral radius at both ends of the spectrum, of the transformation itself."""

    def step(alpha: jax.Array, curvature: jax.Array, point: jax.Array) -> jax.Array:
        x, momentum = point
        tx = lro.scale_by_nag_gs(alpha, MU, gamma, constant_gamma=True)
        state = tx.init(x)._replace(momentum=momentum)
        update, state = tx.update(curvature * x, state)
        return jnp.stack([x + update, state.momentum])

    over_points = jax.vmap(step, (None, None, 0), out_axes=1)
    over_curvatures = jax.vmap(over_points, (None, 0, None))
    steps = jax.jit(jax.vmap(over_curvatures, (0, None, None)))
    matrices = steps(jnp.asarray(alphas), jnp.array([MU, L]), jnp.eye(2))
    return np.abs(np.linalg.eigvals(np.asarray(matrices, np.float64))).max((1, 2))


def loss(tx: optax.GradientTransformation) -> np.ndarray:
    """The loss before each step, from ones."""

    def body(carry: Any, _: None) -> tuple[Any, jax.Array]:
        x, state = carry
        updates, state = tx.update(CURVATURES * x, state)
        return (optax.apply_updates(x, updates), state), jnp.sum(CURVATURES * x**2) / 2

    start = jnp.ones_like(CURVATURES)
    return np.asarray(jax.lax.scan(body, (start, tx.init(start)), length=STEPS)[1])
