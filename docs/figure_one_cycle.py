"""The figure of the page on one-cycle: the schedules, and a range test on scikit-learn's digits."""

from pathlib import Path
import sys
from typing import Any

import jax
import numpy as np
import optax
from plots import plot_lr_range_test

import lowrank_optax as lro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import digits

STEPS = 101
TEST_STEPS, MOMENTUM = 300, 0.9  # of the right half


def one_cycle(figure: Any) -> None:
    """Rates and momenta of both shapes beside optax's; the losses of a range test."""
    schedules, test = figure.subplots(1, 2)
    linear, cosine = (
        lro.schedules.one_cycle_schedules(STEPS, 1.0),
        lro.schedules.one_cycle_schedules(
            STEPS, 1.0, pct_start=0.25, pct_final=None, shape="cosine"
        ),
    )
    steps = np.arange(STEPS)
    drawn = {
        "learning rate": (linear.learning_rate, "-", "#3c6e9f"),
        "learning rate, cosine": (cosine.learning_rate, "--", "#3c6e9f"),
        "optax's cosine_onecycle": (optax.cosine_onecycle_schedule(100, 1.0), ":", "0.45"),
        "momentum": (linear.momentum, "-", "#c0712a"),
        "momentum, cosine": (cosine.momentum, "--", "#c0712a"),
    }
    for label, (schedule, style, colour) in drawn.items():
        schedules.plot(steps, jax.vmap(schedule)(steps), style, color=colour, label=label)
    schedules.set_ylim(0, 1.45)
    schedules.set_yticks(np.linspace(0, 1, 6))
    schedules.set_xlabel("step")
    schedules.set_ylabel("over the peak; momentum")
    plot_lr_range_test(range_test(), axes=test)
    for axes, where, columns in ((schedules, "upper center", 2), (test, "lower left", 1)):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8, loc=where, ncols=columns)


def range_test() -> lro.training.RangeTestResult:
    """Of a perceptron on the digits, by gradient descent with momentum."""
    model, data = digits.mlp(), digits.load().train
    tx = optax.trace(MOMENTUM)
    params = model.init(jax.random.key(0))

    def step_fn(state: Any, batch: Any, learning_rate: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = state
        loss, gradient = jax.value_and_grad(lambda p: digits.loss(model, p, batch))(params)
        updates, moments = tx.update(gradient, moments)
        step = lambda p, u: p - learning_rate * u
        return (jax.tree.map(step, params, updates), moments), loss

    keys = jax.random.split(jax.random.key(1), TEST_STEPS)
    batches = jax.vmap(lambda key: digits.batch_at(data, key, 64))(keys)
    state = params, tx.init(params)
    result = lro.training.lr_range_test(step_fn, state, batches, min_learning_rate=1e-5)
    for name, (rate, reason) in result.suggestions._asdict().items():
        print(f"  {name} {rate:.3g}: {reason}")
    return result
