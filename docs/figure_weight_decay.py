"""The figure of the page on weight decay: the way into equilibrium, and what bfloat16 loses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

SIZE = 2000
# Learning rate, weight decay and steps of each; the product of the first two is a time.
WALKS = {"SGD": ("sgd", 0.1, 0.05, 1000), "AdamW": ("adamw", 0.01, 0.1, 5000)}
STEPS, DECAY = 4000, 0.1  # of the right half
RATE = optax.linear_schedule(1e-3, 0.0, STEPS)


def weight_decay(figure: Any) -> None:
    """Norm and rotation over their equilibrium; norms and lost decay in float32 and bfloat16."""
    walks, precisions = figure.subplots(1, 2)
    for (label, (kind, rate, decay, steps)), colour in zip(
        WALKS.items(), ("#3c6e9f", "#c0712a"), strict=True
    ):
        at = lro.training.equilibrium(kind, rate, decay, size=SIZE, unit_gradient_norm=SIZE**0.5)
        for start in (0.5, 2.0):
            numbers = walk(optimizer(kind, rate, decay), start * float(at.norm), steps)
            time = rate * decay * np.arange(steps)
            norms, angles = numbers["weight_norm"] / at.norm, numbers["rotation"] / at.rotation
            names = (f"{label}: norm", f"{label}: rotation") if start > 1 else (None, None)
            walks.plot(time, norms, color=colour, label=names[0])
            walks.plot(time, smooth(angles), ":", color=colour, label=names[1])
    walks.axhline(1, color="0.55", linewidth=0.8)
    walks.set_xlim(0, 3)
    walks.set_ylim(0, 3.4)
    walks.set_xlabel("steps × learning rate × weight decay")
    walks.set_ylabel("over the equilibrium predicted")
    for label, dtype, rounding, style in (
        ("float32", jnp.float32, None, "-"),
        ("bfloat16, compensated", jnp.bfloat16, "compensated", "--"),
        ("bfloat16, stochastic", jnp.bfloat16, "stochastic", "-"),
        ("bfloat16, nearest", jnp.bfloat16, None, "-"),
    ):
        numbers = walk(rounded(rounding), 0.37 * SIZE**0.5, STEPS, dtype, turning=False)
        norms = numbers["weight_norm"] / numbers["weight_norm"][0]
        (line,) = precisions.plot(norms, style, label=label)
        if label == "bfloat16, nearest":
            precisions.plot(
                smooth(numbers["decay_lost"]), ":", color=line.get_color(), label="its decay lost"
            )
    precisions.set_ylim(0.7, 1.02)
    precisions.set_xlabel("step")
    precisions.set_ylabel("norm over the first; share lost")
    for axes in (walks, precisions):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    walks.legend(frameon=False, fontsize=8)
    precisions.legend(frameon=False, fontsize=8, loc="lower left")


def optimizer(kind: Any, rate: float, decay: float) -> optax.GradientTransformation:
    """Gradient descent or AdamW, monitored."""
    tx = optax.adamw(rate, weight_decay=decay)
    if kind == "sgd":
        tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
    return optax.chain(tx, monitor(rate, decay))


def rounded(rounding: Any) -> optax.GradientTransformation:
    """AdamW with arithmetic in float32, and a way of rounding bfloat16."""
    tx = lro.in_float32(optax.adamw(RATE, weight_decay=DECAY))
    if rounding is not None:
        tx = optax.chain(tx, lro.round_updates(rounding))
    return optax.chain(tx, monitor(RATE, DECAY))


def monitor(rate: Any, decay: float) -> optax.GradientTransformation:
    """Its predictions are not drawn: those of `equilibrium` do not depend on the run."""
    return lro.training.monitor_weight_decay(learning_rate=rate, weight_decay=decay)


def walk(
    tx: optax.GradientTransformation,
    norm: float,
    steps: int,
    dtype: Any = jnp.float32,
    turning: bool = True,
) -> Any:
    """Numbers of a run from weights of a norm on random gradients.

    ``turning``: the gradients are those of scale-invariant weights, at right angles to them and the
    smaller the larger these are.
    """
    start = np.random.default_rng(0).normal(size=SIZE)
    params = {"kernel": jnp.asarray(start * norm / np.linalg.norm(start), dtype)}

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        w, g = params["kernel"].astype(jnp.float32), jax.random.normal(key, (SIZE,))
        if turning:
            g = (g - w * (g @ w) / (w @ w)) / jnp.linalg.norm(w)
        updates, state = tx.update({"kernel": g.astype(dtype)}, state, params)
        return (optax.apply_updates(params, updates), state), state

    keys = jax.random.split(jax.random.key(1), steps)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[1])
    return lro.training.measurements(run((params, tx.init(params))))["all"]


def smooth(values: np.ndarray, width: int = 25) -> np.ndarray:
    """A moving average, of as many values."""
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")
