"""The figure of the page on FlyLoRA: changes of two tasks, and how ranks are balanced."""

import functools
from typing import Any, get_args
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from lowrank_optax.adapters.methods.flylora import Score
from lowrank_optax.adapters.operands import Rows

D_IN, D_OUT, BATCH, STEPS, SEEDS = 128, 32, 128, 1500, 3
OWN = (0.1, 0.3, 1.0, 3.0)  # size of what each task wants for itself, beside what both want
TOKENS, WIDTH, BALANCE_STEPS = 512, 64, 1500


def low_rank(key: jax.Array) -> jax.Array:
    """A random matrix of rank 4; of a standard normal input it makes outputs of variance one."""
    u, v = jax.random.split(key)
    first, second = jax.random.normal(u, (D_IN, 4)), jax.random.normal(v, (4, D_OUT))
    return first @ second / np.sqrt(4 * D_IN)


@functools.partial(jax.jit, static_argnums=0)
def fit(method: Any, key: jax.Array, target: jax.Array, x: jax.Array) -> Any:
    """Output on ``x`` and the product of factors of an adapter trained towards a change."""
    params, tx = method.init(key, target[None]), optax.adam(optax.linear_schedule(3e-3, 0, STEPS))
    if "balance_bias" in params.trainable:
        tx = lro.adapters.flylora_balance(tx, step=0.0)

    def out(trained: Any, x: jax.Array) -> jax.Array:
        p = method.layer_arrays(params._replace(trainable=trained), 0)
        return method.branch(p, Rows(x), y=jnp.zeros((len(x), D_OUT)), weight=target)

    def step(carry: Any, number: jax.Array) -> Any:
        trained, state = carry
        x = jax.random.normal(jax.random.fold_in(key, number), (BATCH, D_IN))
        loss = lambda t: jnp.mean(jnp.square(out(t, x) - x @ target))
        updates, state = tx.update(jax.grad(loss)(trained), state)
        return (optax.apply_updates(trained, updates), state), None

    start = params.trainable, tx.init(params.trainable)
    (trained, _), _ = jax.lax.scan(step, start, jnp.arange(STEPS))
    p = method.layer_arrays(params._replace(trainable=trained), 0)
    return out(trained, x), jnp.matmul(*method.factors(p))


def cosine(a: jax.Array, b: jax.Array) -> float:
    """Of two matrices."""
    return float(jnp.sum(a * b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))


@functools.cache
def two_tasks(method: Any, own: float, seed: int) -> tuple[float, float, float, float]:
    """Cosines of the wanted and of the learned changes; relative errors alone and summed."""
    keys = jax.random.split(jax.random.key(seed), 6)
    wanted = [low_rank(keys[0]) + own * low_rank(key) for key in keys[1:3]]
    x = jax.random.normal(keys[5], (2048, D_IN))
    outs, changes = zip(
        *[fit(method, k, d, x) for k, d in zip(keys[3:5], wanted, strict=True)], strict=True
    )
    error = lambda y, d: float(jnp.sum((y - x @ d) ** 2) / jnp.sum((x @ d) ** 2))
    alone = np.mean([error(y, d) for y, d in zip(outs, wanted, strict=True)])
    summed = np.mean([error(sum(outs), d) for d in wanted])
    return cosine(*wanted), cosine(*changes), float(alone), float(summed)


def spread(score: Score) -> np.ndarray:
    """How far apart the counts of ranks are, by step of balancing on the same inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one score cannot be balanced is what is shown
        method = lro.adapters.FlyLoRA(rank=8, active=2, score=score)
    p = method.layer_arrays(method.init(jax.random.key(0), jnp.zeros((1, WIDTH, 4))), 0)
    x, w = jax.random.normal(jax.random.key(1), (TOKENS, WIDTH)), jnp.zeros((WIDTH, 4))
    tx = lro.adapters.flylora_balance(optax.set_to_zero())

    def step(trained: Any, _: Any) -> Any:
        out = lambda t: jnp.sum(method.branch(p | t, Rows(x), y=x @ w, weight=w))
        updates, _ = tx.update(jax.grad(out)(trained), tx.init(trained))
        counts = jnp.sum(method.used(p | trained, x @ p["A"]), axis=0)
        return optax.apply_updates(trained, updates), jnp.ptp(counts)

    start = {name: p[name] for name in ("B", "balance_bias")}
    return np.asarray(jax.jit(lambda t: jax.lax.scan(step, t, length=BALANCE_STEPS)[1])(start))


def flylora(figure: Any) -> None:
    """Cosines of two tasks' changes, and spreads of counts while ranks are balanced."""
    cosines, spreads = figure.subplots(1, 2)
    methods = {"LoRA": lro.adapters.LoRA(rank=8, alpha=16), "FlyLoRA": lro.adapters.FlyLoRA()}
    cosines.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
    for (name, method), colour in zip(methods.items(), ("0.55", "#3c6e9f"), strict=True):
        found = np.array([[two_tasks(method, own, seed) for seed in range(SEEDS)] for own in OWN])
        wanted, learned, alone, summed = found.mean(axis=1).T
        cosines.plot(wanted, learned, "o-", color=colour, label=name)
        for own, *numbers in zip(OWN, alone, summed, strict=True):
            print(
                f"    {name}, own part {own}: error alone {numbers[0]:.2f}, summed {numbers[1]:.2f}"
            )
    cosines.set_xlabel("cosine of the changes that two tasks want")
    cosines.set_ylabel("cosine of those learned")
    colours = {"magnitude": "#3c6e9f", "signed": "#4b8a4a", "biased_magnitude": "#c0712a"}
    for score in get_args(Score):
        spreads.plot(spread(score), color=colours[score], linewidth=1, label=score)
    spreads.set_ylim(bottom=0)
    spreads.set_xlabel("step of balancing")
    spreads.set_ylabel("tokens of the most used rank\nless those of the least used")
    for axes in (cosines, spreads):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
