"""The figure of the page on AFLoRA: how much is still trained, and what that costs in loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Rows

LAYERS, WIDTH, HIDDEN, ROWS, STEPS, RATE = 6, 24, 48, 256, 400, 1e-2
RUN = {"total_steps": STEPS, "warmup_steps": 20, "final_steps": 280}  # an epoch of 20 and 0.7
Weights = dict[str, jax.Array]


def aflora(figure: Any) -> None:
    """Fractions of the factors that are trained, and losses."""
    fractions, losses = figure.subplots(1, 2)
    steps = np.arange(STEPS)
    rho = jax.vmap(lro.adapters.aflora_schedule(**RUN))(jnp.arange(STEPS))
    fractions.plot(steps, rho, color="0.55", linestyle=":", label=r"the schedule, $\rho(t)$")
    method, adam = lro.adapters.AFLoRA(rank=4), optax.adam(RATE)
    curves = {"LoRA": train(lro.adapters.LoRA(rank=4), adam)[0]}
    for mode, colour in (("quantile", "#c0712a"), ("fraction", "#3c6e9f")):
        tx = lro.adapters.aflora_freezing(adam, **RUN, mode=mode)
        curves[f"AFLoRA, {mode}"], trained = train(method, tx)
        fractions.plot(steps, trained, color=colour, label=mode)
    vectors = optax.partition(
        {True: adam, False: optax.set_to_zero()},
        lambda params: {n: {k: k in "db" for k in arrays} for n, arrays in params.items()},
    )
    curves["vectors alone"] = train(method, vectors)[0]
    colours = ("0.55", "#c0712a", "#3c6e9f", "#4b8a4a")
    for (name, values), colour in zip(curves.items(), colours, strict=True):
        losses.plot(steps, values, color=colour, label=name)
    losses.set_yscale("log")
    losses.set_ylabel("loss")
    fractions.set_ylabel("factors still trained")
    fractions.set_xlim(0, 150)
    for axes in (fractions, losses):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)


def train(
    method: lro.adapters.Adapter, tx: optax.GradientTransformation
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of a run on `task`, and the fraction of the matrices of `aflora_freezing` trained."""
    weights, x, target = task(0)
    params = {n: method.init(jax.random.key(i), w) for i, (n, w) in enumerate(weights.items())}
    frozen = {name: p.frozen for name, p in params.items()}
    base = {n: weights[n] if p.base is None else p.base for n, p in params.items()}

    def loss(trained: Any) -> jax.Array:
        arrays = {name: trained[name] | frozen[name] for name in trained}
        return jnp.mean(jnp.square(network(base, x, method, arrays) - target))

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        trained, state = carry
        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(gradient, state, trained)
        return (optax.apply_updates(trained, updates), state), (value, left(state))

    trained = {name: p.trainable for name, p in params.items()}
    values, fractions = jax.jit(lambda c: jax.lax.scan(step, c, length=STEPS)[1])(
        (trained, tx.init(trained))
    )
    return np.asarray(values), np.asarray(fractions)


def left(state: Any) -> jax.Array:
    """The fraction of matrices, all of one size here, that are not frozen."""
    flags = jax.tree.leaves(getattr(state, "frozen", ()))
    return 1 - jnp.mean(jnp.concatenate(flags)) if flags else jnp.ones([])


def task(seed: int) -> tuple[Weights, jax.Array, jax.Array]:
    """Weights of a residual network, inputs, and what another one makes of them.

    That one's weights differ by matrices of rank 4, some layers' more and some less.
    """
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    weights = {
        "up": normal(LAYERS, WIDTH, HIDDEN) / WIDTH**0.5,
        "down": normal(LAYERS, HIDDEN, WIDTH) / HIDDEN**0.5,
    }
    sizes = jnp.array([0.3, 1.0, 0.1, 0.6, 0.2, 1.0])[:, None, None] / 4
    change = lambda w: sizes * normal(LAYERS, w.shape[1], 4) @ normal(LAYERS, 4, w.shape[2])
    others = {name: w + change(w) / w.shape[1] ** 0.5 for name, w in weights.items()}
    x = normal(ROWS, WIDTH)
    return weights, x, network(others, x)


def network(
    weights: Weights, x: jax.Array, method: lro.adapters.Adapter | None = None, arrays: Any = None
) -> jax.Array:
    """The residual network's outputs ``[rows, WIDTH]``, with the arrays of an adapter."""

    def layer(x: jax.Array, of_layer: Any) -> tuple[jax.Array, None]:
        w, p = of_layer

        def projected(name: str, x: jax.Array) -> jax.Array:
            y = x @ w[name]
            return y if method is None else y + method.branch(p[name], Rows(x), y=y, weight=w[name])

        return x + projected("down", jnp.tanh(projected("up", x))), None

    return jax.lax.scan(layer, x, (weights, arrays))[0]
