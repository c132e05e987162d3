"""The figure of the page on Mirror Sinkhorn: how near the optimum, after how many half-scalings."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

import lowrank_optax as lro

SIZE, STEPS = 40, 3000
COUNTS = np.unique(np.geomspace(2, STEPS, 40).astype(int) // 2 * 2)
UNIFORM = jnp.full(SIZE, 1 / SIZE)
EPSILONS = (0.1, 0.01, 0.001)


def problem(seed: int = 0) -> tuple[jax.Array, float]:
    """Squared distances of points in a square over the largest, and the cost of the best match."""
    rng = np.random.default_rng(seed)
    cost = np.sum((rng.random((SIZE, 1, 2)) - rng.random((SIZE, 2))) ** 2, axis=-1)
    cost /= cost.max()
    return jnp.asarray(cost, jnp.float32), float(cost[linear_sum_assignment(cost)].mean())


@partial(jax.jit, static_argnames="average")
def online(cost: jax.Array, noise: float, average: Any) -> jax.Array:
    """Rounded costs after every step, with signs times ``noise`` added to the cost."""
    solver = lro.mirror_sinkhorn(UNIFORM, UNIFORM, bound=1 + noise, average=average)

    def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        signs = jax.random.rademacher(key, cost.shape, cost.dtype)
        state = solver.update(cost + noise * signs, state)
        return state, jnp.sum(cost * solver.plan(state))

    return jax.lax.scan(step, solver.init(), jax.random.split(jax.random.key(0), STEPS))[1]


@jax.jit
def sinkhorn(cost: jax.Array, noise: float, epsilon: float) -> jax.Array:
    """The same of Sinkhorn's half-scalings at one temperature; it sees the noise once."""
    signs = jax.random.rademacher(jax.random.key(0), cost.shape, cost.dtype)
    seen = (cost + noise * signs) / epsilon
    target = jnp.log(UNIFORM)

    def sweep(column: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        row = target - jax.nn.logsumexp(column - seen, axis=1)
        column = target - jax.nn.logsumexp(row[:, None] - seen, axis=0)
        plan = lro.round_to_polytope(jnp.exp(row[:, None] + column - seen), UNIFORM, UNIFORM)
        return column, jnp.sum(cost * plan)

    return jnp.repeat(jax.lax.scan(sweep, jnp.zeros(SIZE), length=STEPS // 2)[1], 2)


def mirror_sinkhorn(figure: Any) -> None:
    """Gaps to the optimum; left of the cost itself, right of one with noise at every step."""
    cost, best = problem()
    panels = figure.subplots(1, 2)
    for axes, noise in zip(panels, (0.0, 0.5), strict=True):
        draw = lambda costs, label, axes=axes, **style: axes.loglog(
            COUNTS, np.maximum(np.asarray(costs)[COUNTS - 1] - best, 1e-6), label=label, **style
        )
        draw(online(cost, noise, "uniform"), "average", color="#3c6e9f")
        draw(online(cost, noise, "last"), "last iterate", color="#c0712a")
        for epsilon, line in zip(EPSILONS, (":", "--", "-."), strict=True):
            label = f"Sinkhorn, ε = {epsilon}"
            draw(sinkhorn(cost, noise, epsilon), label, color="0.45", linestyle=line)
        axes.set_title("the cost" if noise == 0 else "the cost ± 0.5 at every step", fontsize=9)
        axes.set_xlabel("half-scalings")
        axes.set_ylim(8e-4, 0.6)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("gap to the optimum, after rounding")
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
