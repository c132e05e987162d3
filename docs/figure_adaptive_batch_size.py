"""The figure of the page on adaptive batch sizes: noisy logistic regression."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

FEATURES, CLASSES, MICRO, LARGEST, BUDGET, RATE = 20, 10, 4, 512, 2**16, 0.5
SEEDS = 3
COLOURS = {"8": "0.55", "adaptive": "#3c6e9f", "512": "#c0712a"}


def loss_fn(params: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(x @ params, y)
    return losses.mean() + 1e-3 * jnp.sum(params**2)


def draw(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Examples whose classes are drawn by softmax of a fixed linear map."""
    truth = jax.random.normal(jax.random.key(0), (FEATURES, CLASSES))
    x = jax.random.normal(key, (*shape, FEATURES))
    return x, jax.random.categorical(jax.random.fold_in(key, 1), x @ truth)


@functools.partial(jax.jit, static_argnums=(0, 1))
def chunk(control: lro.training.AdaptiveBatchSize, steps: int, carry: Any, key: jax.Array) -> Any:
    """Some steps: one program for all sizes, of which a part of the groups is used."""

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        params, state = carry
        batch = draw(key, (control.largest // MICRO, MICRO))
        groups = state.batch_size // MICRO
        _, gradient, noise = lro.training.accumulate_with_noise(
            loss_fn, params, batch, groups=groups
        )
        rate = RATE * jnp.where(state.samples < BUDGET, 1.0, 0.0)
        new = params - rate * gradient, control.observe(state, noise)
        return new, (new[1], loss_fn(new[0], draw(jax.random.key(9), (1024,))))

    return jax.lax.scan(step, carry, jax.random.split(key, steps))


def run(control: lro.training.AdaptiveBatchSize, seed: int) -> tuple[Any, np.ndarray]:
    """The controller's states, and the losses, until the budget of examples is read."""
    carry = jnp.zeros((FEATURES, CLASSES)), control.init()
    key, parts = jax.random.key(100 + seed), []
    while int(carry[1].samples) < BUDGET:
        key, now = jax.random.split(key)
        carry, part = chunk(control, 128, carry, now)
        parts.append(part)
    states, losses = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    kept = states.samples <= BUDGET
    return jax.tree.map(lambda x: x[kept], states), losses[kept]


def lowest_loss() -> float:
    """The loss at the minimum, by Newton-like steps on all the examples that losses are of."""
    batch, tx = draw(jax.random.key(9), (1024,)), optax.lbfgs()
    value = lambda params: loss_fn(params, batch)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, gradient = optax.value_and_grad_from_state(value)(params, state=state)
        updates, state = tx.update(
            gradient, state, params, value=loss, grad=gradient, value_fn=value
        )
        return (optax.apply_updates(params, updates), state), loss

    params = jnp.zeros((FEATURES, CLASSES))
    return float(
        jax.jit(lambda c: jax.lax.scan(step, c, length=40))((params, tx.init(params)))[1][-1]
    )


def adaptive_batch_size(figure: Any) -> None:
    """Batch sizes, and losses, over the examples read."""
    sizes, losses = figure.subplots(1, 2)
    make = functools.partial(
        lro.training.AdaptiveBatchSize,
        micro_batch_size=MICRO,
        eta=0.9,
        decay=0.95,
        test_interval=10,
    )
    controls = {
        "8": make(initial=8, maximum=8),
        "adaptive": make(initial=8, maximum=LARGEST),
        "512": make(initial=LARGEST, maximum=LARGEST),
    }
    least = lowest_loss()
    for name, control in controls.items():
        for seed in range(SEEDS):
            states, curve = run(control, seed)
            style = {"color": COLOURS[name], "alpha": 0.9}
            label = (f"batch {name}" if name != "adaptive" else "adaptive") if seed == 0 else None
            losses.loglog(states.samples, curve - least, linewidth=1.2, label=label, **style)
            if name == "adaptive":
                sizes.loglog(states.samples, states.batch_size, label=label, **style)
                scale = np.where(np.isfinite(states.noise_scale), states.noise_scale, np.nan)
                label = "gradient noise scale" if seed == 0 else None
                sizes.loglog(states.samples, scale, color="0.6", linewidth=0.8, label=label)
    sizes.set_ylabel("examples")
    losses.set_ylabel("loss − its minimum")
    for axes in (sizes, losses):
        axes.set_xlabel("examples read")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
