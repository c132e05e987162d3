"""The figure of the page on LoRA: what the scale does at high ranks, and LoRA+'s ratio."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax.adapters import LoRA
from lowrank_optax.adapters.operands import Rows

WIDTH, TOKENS, STEPS = 128, 512, 150
COLOURS = ("#3c6e9f", "#c0712a", "#4b8a4a")


def lora(figure: Any) -> None:
    """Losses over the rank for both scales; losses over the rate for some ratios."""
    scales, ratios = figure.subplots(1, 2)
    ranks = (1, 2, 4, 8, 16, 32, 64, 128)
    for name, stabilized, colour in (
        (r"LoRA, $\alpha / r$", False, COLOURS[0]),
        (r"rsLoRA, $\alpha / \sqrt{r}$", True, COLOURS[1]),
    ):
        ends = [
            train(LoRA(rank=r, alpha=4, rank_stabilized=stabilized), 3e-3, 1.0)[-1] for r in ranks
        ]
        scales.loglog(ranks, ends, "o-", base=2, color=colour, label=name, markersize=4)
    scales.set_yscale("log", base=10)
    scales.set_xlabel("rank")
    rates = np.geomspace(1e-4, 3e-2, 9)
    for ratio, colour in zip((1.0, 4.0, 16.0), COLOURS, strict=True):
        ends = sweep(LoRA(rank=8, alpha=8), rates, ratio)
        ratios.loglog(rates, ends, "o-", color=colour, label=f"ratio {ratio:.0f}", markersize=4)
    ratios.set_xlabel("learning rate of A")
    for axes in (scales, ratios):
        axes.set_ylabel(f"loss after {STEPS} steps")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)


def problem() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs, a frozen weight, and targets of a weight whose change has falling singular values."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(TOKENS, WIDTH)), rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5
    u, v = (np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] for _ in range(2))
    change = u * (0.5 ** (np.arange(WIDTH) / 4)) @ v.T
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, w, x @ (w + change)))  # type: ignore[return-value]


def sweep(method: LoRA, rates: np.ndarray, ratio: float) -> np.ndarray:
    """The last losses at all rates."""
    return np.asarray(jax.jit(jax.vmap(lambda rate: losses(method, rate, ratio)[-1]))(rates))


def train(method: LoRA, rate: float, ratio: float) -> np.ndarray:
    """The losses at one rate."""
    return np.asarray(jax.jit(lambda: losses(method, rate, ratio))())


def losses(method: LoRA, rate: Any, ratio: float) -> jax.Array:
    """The losses of a linear layer fitted with Adam, before each step and after the last."""
    x, w, y = problem()
    params = method.init(jax.random.key(0), w[None])
    tx = optax.chain(optax.adam(rate), lro.adapters.scale_lora_plus(ratio))

    def loss(trained: dict[str, jax.Array]) -> jax.Array:
        p = method.layer_arrays(params._replace(trainable=trained), 0)
        return jnp.mean(jnp.square(x @ w + method.branch(p, Rows(x), y=x @ w, weight=w) - y))

    def step(carry: Any, _: None) -> Any:
        trained, state = carry
        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(gradient, state, trained)
        return (optax.apply_updates(trained, updates), state), value

    start = (params.trainable, tx.init(params.trainable))
    (trained, _), values = jax.lax.scan(step, start, length=STEPS)
    return jnp.append(values, loss(trained))
