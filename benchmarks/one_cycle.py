"""Constant, cosine and one-cycle learning rates on scikit-learn's digits, at equal steps.

    python benchmarks/one_cycle.py             # whatever is missing in the results file
    python benchmarks/one_cycle.py --markdown  # the table as Markdown

A perceptron by gradient descent with momentum from each seed, at each of some peaks; the table
compares the schedules at the best peak of each, chosen by held-out accuracy and then training loss,
and says what the range test of each seed suggested. Few steps, since that is what one-cycle is for:
some minutes of one core. A schedule is one compiled program for all peaks and seeds, and a stopped
run goes on after the last.
"""

import argparse
from collections.abc import Callable
import math
from pathlib import Path
import time
from typing import Any

import digits
from family_table import Column, print_columns
import jax
import jax.numpy as jnp
import numpy as np
import optax
from projection_family import RESULTS, Results

import lowrank_optax as lro

PEAKS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.8)
MOMENTUM = 0.9  # where it is constant
Make = Callable[[Any, int], optax.GradientTransformation]
SCHEDULES: dict[str, Make] = {
    "constant": lambda peak, steps: optax.sgd(peak, MOMENTUM),
    "cosine": lambda peak, steps: optax.sgd(cosine(peak, steps), MOMENTUM),
    "1cycle, rate alone": lambda peak, steps: lro.training.one_cycle(
        optax.sgd, steps, peak, momentum_name=None, momentum=MOMENTUM
    ),
    "1cycle, rate and momentum": lambda peak, steps: lro.training.one_cycle(optax.sgd, steps, peak),
    "1cycle, both, damped": lambda peak, steps: lro.training.one_cycle(
        optax.sgd, steps, 10 * peak, dampen=True
    ),
}


def cosine(peak: Any, steps: int) -> optax.Schedule:
    """Half a wave, from a peak that may be traced down to nothing."""
    return lambda count: peak * optax.cosine_decay_schedule(1.0, steps)(count)


def train_all(make: Make, seeds: int, steps: int) -> dict[str, Any]:
    """By peak, held-out accuracies and training losses of all seeds."""
    began = time.perf_counter()
    model, data = digits.mlp(), digits.load()

    def run(peak: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.key(seed)
        params = digits.train(model, make(peak, steps), key, data.train, steps).params
        return digits.accuracy(model, params, data.test), digits.loss(model, params, data.train)

    pairs = jnp.repeat(jnp.array(PEAKS), seeds), jnp.tile(jnp.arange(seeds), len(PEAKS))
    found = [np.asarray(x).reshape(-1, seeds) for x in jax.jit(jax.vmap(run))(*pairs)]
    peaks = {
        f"{peak:g}": {
            "accuracy": [round(float(x), 4) for x in accuracy],
            "loss": [float(f"{x:.4g}") if math.isfinite(x) else None for x in loss],
        }
        for peak, accuracy, loss in zip(PEAKS, *found, strict=True)
    }
    return {"peaks": peaks, "seconds": round(time.perf_counter() - began, 1)}


def range_test(seed: int, steps: int) -> dict[str, Any]:
    """What a range test suggests for the same model and seed, and where its loss was lowest."""
    model, data, tx = digits.mlp(), digits.load().train, optax.trace(MOMENTUM)
    weights_key, batches_key = jax.random.split(jax.random.key(seed))
    params = model.init(weights_key)

    def step_fn(state: Any, batch: Any, learning_rate: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = state
        loss, gradient = jax.value_and_grad(lambda p: digits.loss(model, p, batch))(params)
        updates, moments = tx.update(gradient, moments)
        updates = optax.tree.scale(-learning_rate, updates)
        return (optax.apply_updates(params, updates), moments), loss

    keys = jax.random.split(batches_key, steps)
    batches = jax.vmap(lambda key: digits.batch_at(data, key, 64))(keys)
    result = lro.training.lr_range_test(
        step_fn, (params, tx.init(params)), batches, min_learning_rate=1e-5
    )
    found = {name: x.learning_rate for name, x in result.suggestions._asdict().items()}
    found["lowest_loss_at"] = 10 * found["minimum"]
    if result.stopped_at is not None:
        found["stopped_at"] = float(result.learning_rates[result.stopped_at])
    return {name: float(f"{rate:.3g}") for name, rate in found.items()}


def best_peak(peaks: dict[str, Any]) -> str:
    """The peak with the best mean accuracy; of equals, the one with the least training loss."""
    loss = lambda peak: np.mean([math.inf if x is None else x for x in peaks[peak]["loss"]])
    return max(peaks, key=lambda peak: (np.mean(peaks[peak]["accuracy"]), -loss(peak)))


def print_results(content: dict[str, Any], title: str, markdown: bool) -> None:
    """Prints each schedule at its best peak, and the range tests."""
    rows = []
    for name in SCHEDULES:
        peaks = content["schedules"][name]["peaks"]
        best = best_peak(peaks)
        top = np.mean(peaks[best]["accuracy"])
        good = [peak for peak in peaks if np.mean(peaks[peak]["accuracy"]) > top - 0.01]
        rows.append((name, best, peaks[best], good))
    losses = lambda row: [math.inf if x is None else x for x in row[2]["loss"]]
    columns = [
        Column("schedule", lambda row: row[0]),
        Column("best peak", lambda row: row[1]),
        Column("test accuracy", lambda row: f"{100 * np.mean(row[2]['accuracy']):.1f}%"),
        Column("range", lambda row: f"{100 * np.ptp(row[2]['accuracy']):.1f}%"),
        Column("training loss", lambda row: f"{np.mean(losses(row)):.4f}"),
        Column("peaks within 1%", lambda row: f"{row[3][0]} to {row[3][-1]}"),
    ]
    print_columns(title, rows, columns, markdown)
    print()
    tests = list(content["range tests"].items())
    names = ["minimum", "steepest", "valley", "lowest_loss_at", "stopped_at"]
    columns = [Column("range test", lambda row: row[0])]
    columns += [
        Column(name.replace("_", " "), lambda row, name=name: f"{row[1].get(name, math.nan):.2g}")
        for name in names
    ]
    print_columns("Learning rates of the range tests", tests, columns, markdown)


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--range-test-steps", type=int, default=300)
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "one_cycle.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    setting = {
        "steps": args.steps,
        "seeds": args.seeds,
        "range_test_steps": args.range_test_steps,
        "batch_size": 64,
        "peaks": list(PEAKS),
    }
    results = Results(args.output, setting, args.log)
    for seed in range(args.seeds):
        test = lambda seed=seed: range_test(seed, args.range_test_steps)
        results.once(("range tests", f"seed {seed}"), test)
    for name, make in SCHEDULES.items():
        run = lambda make=make: train_all(make, args.seeds, args.steps)
        results.once(("schedules", name), run)
    title = f"Perceptron on digits, {args.steps} steps of 64 images"
    print_results(results.content, title, args.markdown)


if __name__ == "__main__":
    main()
