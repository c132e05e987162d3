"""The figure of the page on PiSSA: a fine-tuning in miniature, and errors of quantized weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Rows
from lowrank_optax.adapters.spectra import truncated_svd
from lowrank_optax.quantization import nf4_round

STEPS = 200
RATES = jnp.array([1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1])


def pissa(figure: Any) -> None:
    """Losses of LoRA and PiSSA, and how much of NF4's error is taken away."""
    losses, ratios = figure.subplots(1, 2)
    turned, new = tasks()["turned"], tasks()["new"]
    for i, method in enumerate((lro.adapters.LoRA(rank=4), lro.adapters.PiSSA(rank=4))):
        name = type(method).__name__
        losses.plot(best_run(method, turned), color=f"C{i}", label=f"{name}, turned")
        losses.plot(best_run(method, new), color=f"C{i}", linestyle=":", label=f"{name}, new")
    losses.set_ylim(0, 1.05)
    losses.set_xlabel("step")
    losses.set_ylabel("loss, over that at the start")
    losses.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.68), ncols=2)
    rounds = range(1, 7)
    w = decaying()
    for name, quantized in (("QPiSSA", qpissa), ("LoftQ", loftq)):
        found = [float(lro.adapters.reduction_ratio(w, quantized(w, t))) for t in rounds]
        ratios.plot(rounds, found, marker="o", label=name)
    ratios.set_ylim(0, 50)
    ratios.set_xlabel("rounds")
    ratios.set_ylabel("of NF4's error taken away, %")
    ratios.legend(frameon=False, loc="lower right")
    for axes in (losses, ratios):
        axes.spines[["top", "right"]].set_visible(False)


def decaying() -> jax.Array:
    """``[256, 384]``, with random singular vectors and the singular values ``j ** -0.5``."""
    draw = np.random.default_rng(0).standard_normal
    u, v = (np.linalg.qr(draw((n, 256)))[0] for n in (256, 384))
    return jnp.asarray((u * np.arange(1, 257) ** -0.5) @ v.T, jnp.float32)


def pretrained() -> jax.Array:
    """A weight ``[96, 64]`` whose singular values decay."""
    u, _, v = truncated_svd(decaying()[:96, :64], 64)
    return 3 * (u * jnp.arange(1, 65) ** -0.5) @ v.T


def tasks() -> dict[str, jax.Array]:
    """What the weight shall become.

    Its directions turned a little, so that most is to be learned where it is large; as much at
    random, of rank 4; or its singular values changed by a fifth or so.
    """
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    w = pretrained()
    u, s, v = truncated_svd(w, 64)
    turned = jnp.linalg.qr(jnp.eye(96) + 0.03 * draw(1, 96, 96))[0]
    turned = turned * jnp.sign(jnp.diagonal(turned)) @ w
    random = draw(2, 96, 4) @ draw(3, 4, 64)
    size = jnp.linalg.norm(turned - w)
    new = w + random * size / jnp.linalg.norm(random)
    return {"turned": turned, "new": new, "values": (u * (s * (1 + 0.2 * draw(4, 64)))) @ v.T}


def best_run(method: lro.adapters.Adapter, goal: jax.Array) -> np.ndarray:
    """Losses over the first one, of Adam at the learning rate that ends lowest."""
    w = pretrained()
    params = method.init(jax.random.key(0), w[None])
    base = w if params.base is None else params.base[0]
    frozen = {name: x[0] for name, x in params.frozen.items()}

    def loss(trained: Any) -> jax.Array:
        """The mean over inputs of covariance one."""
        y = base + method.branch(frozen | trained, Rows(jnp.eye(96)), y=base, weight=base)
        return jnp.sum((y - goal) ** 2)

    def run(rate: jax.Array) -> jax.Array:
        tx = optax.adam(optax.linear_schedule(rate, 0.0, STEPS))
        trained = {name: x[0] for name, x in params.trainable.items()}

        def step(carry: Any, _: Any) -> Any:
            trained, state = carry
            value, gradient = jax.value_and_grad(loss)(trained)
            updates, state = tx.update(gradient, state)
            return (optax.apply_updates(trained, updates), state), value

        return jax.lax.scan(step, (trained, tx.init(trained)), length=STEPS)[1]

    runs = np.asarray(jax.jit(jax.vmap(run))(RATES))
    return runs[np.argmin(runs[:, -1])] / runs[0, 0]


def qpissa(w: jax.Array, rounds: int) -> jax.Array:
    """What a layer with QPiSSA's start stands for."""
    method = lro.adapters.PiSSA(rank=16, nf4_rounds=rounds)
    params = method.init(jax.random.key(0), w[None])
    return (params.base + method.deltas(params, params.base))[0]


def loftq(w: jax.Array, rounds: int) -> jax.Array:
    """What one with LoftQ's start stands for: it quantizes first, and decomposes the error."""
    low_rank = base = jnp.zeros_like(w)
    for _ in range(rounds):
        base = nf4_round(w - low_rank)
        u, s, v = truncated_svd(w - base, 16)
        low_rank = (u * s) @ v.T
    return base + low_rank
