"""NAG-GS, SGD with momentum and AdamW on scikit-learn's digits, over a grid of learning rates.

    python benchmarks/digits_optimizers.py             # whatever is missing in the results file
    python benchmarks/digits_optimizers.py --markdown  # the tables as Markdown

Logistic regression and a small residual network, from each seed, with a constant learning rate. The
first table compares the methods at the best rate of each; the second NAG-GS and SGD at the learning
rate and momentum that `to_heavy_ball` makes equal. Some eight minutes of one core; each model and
method is one compiled program for all rates and seeds, and a stopped run goes on after the last.
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

MODELS = {"logistic regression": digits.logistic, "residual network": digits.cnn}
MU, GAMMA = 1.0, 1.5  # the defaults of the official JAX code
# As the official notebook on VGG-11, whose gamma does not move.
AS_PUBLISHED = "NAG-GS, constant γ, μ = 1e-4"
Make = Callable[[Any], optax.GradientTransformation]
METHODS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "NAG-GS": (
        lambda rate: lro.nag_gs(rate, MU, GAMMA),
        (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    ),
    AS_PUBLISHED: (
        lambda rate: lro.nag_gs(rate, 1e-4, 1.0, constant_gamma=True),
        (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    ),
    "SGD, momentum 0.9": (
        lambda rate: optax.sgd(rate, momentum=0.9),
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    "AdamW": (
        lambda rate: optax.adamw(rate),
        (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    ),
}
EQUAL_RATES = (0.1, 0.3, 1.0)
EQUAL: dict[str, Make] = {
    "NAG-GS": lambda rate: lro.nag_gs(rate, MU, GAMMA, constant_gamma=True),
    "SGD": lambda rate: optax.sgd(*lro.to_heavy_ball(rate, MU, GAMMA)),
}


def run_all(
    model: digits.Model, make: Make, rates: tuple[float, ...], seeds: int, steps: int
) -> dict[str, np.ndarray]:
    """Trains from every seed at every rate, all at once.

    Returns:
      ``accuracy`` and ``loss`` ``[rates, seeds]``, on the test and on the training images after the
      last step, and ``losses`` ``[rates, seeds, steps]`` of the batches.
    """
    data = digits.load()
    pairs = jnp.repeat(jnp.array(rates), seeds), jnp.tile(jnp.arange(seeds), len(rates))

    def run(rate: jax.Array, seed: jax.Array) -> digits.Trained:
        return digits.train(model, make(rate), jax.random.key(seed), data.train, steps)

    def held(params: Any) -> tuple[jax.Array, jax.Array]:
        return digits.accuracy(model, params, data.test), digits.loss(model, params, data.train)

    trained = jax.jit(jax.vmap(run))(*pairs)
    # One after the other: all images of all runs at once would take gigabytes.
    accuracy, loss = jax.jit(lambda params: jax.lax.map(held, params))(trained.params)
    shaped = lambda x: np.asarray(x).reshape(len(rates), seeds, *x.shape[1:])
    return {"accuracy": shaped(accuracy), "loss": shaped(loss), "losses": shaped(trained.losses)}


def grid(model: str, method: str, seeds: int, steps: int) -> dict[str, Any]:
    """What the results hold of a method: by rate, accuracies and losses of the seeds."""
    began = time.perf_counter()
    make, rates = METHODS[method]
    found = run_all(MODELS[model](), make, rates, seeds, steps)
    each = {f"{rate:g}": _figures(found, i) for i, rate in enumerate(rates)}
    return {"rates": each, "seconds": round(time.perf_counter() - began, 1)}


def equal(model: str, seeds: int, steps: int) -> dict[str, Any]:
    """NAG-GS and SGD at equal rate and momentum: how far apart their curves are."""
    found = {
        name: run_all(MODELS[model](), make, EQUAL_RATES, seeds, steps)
        for name, make in EQUAL.items()
    }
    curves = {name: x["losses"].astype(np.float64) for name, x in found.items()}
    gap = np.abs(curves["NAG-GS"] - curves["SGD"]).max((1, 2))
    rows = {}
    for i, alpha in enumerate(EQUAL_RATES):
        ball = lro.to_heavy_ball(alpha, MU, GAMMA)
        rows[f"{alpha:g}"] = {
            "learning_rate": ball.learning_rate,
            "momentum": ball.momentum,
            "each": {name: _figures(answers, i) for name, answers in found.items()},
            "largest_gap_of_batch_losses": _finite(gap[i]),
        }
    return rows


def _figures(found: dict[str, np.ndarray], i: int) -> dict[str, Any]:
    """The accuracies and losses of all seeds at one rate."""
    return {
        "accuracy": [round(float(x), 4) for x in found["accuracy"][i]],
        "loss": [_finite(x) for x in found["loss"][i]],
    }


def _finite(x: Any) -> float | None:
    return float(f"{float(x):.4g}") if math.isfinite(x) else None


def best_rate(rates: dict[str, Any]) -> str:
    """The rate with the best mean accuracy; of equals, the one with the least training loss."""
    loss = lambda rate: np.mean([math.inf if x is None else x for x in rates[rate]["loss"]])
    return max(rates, key=lambda rate: (np.mean(rates[rate]["accuracy"]), -loss(rate)))


def print_grid(content: dict[str, Any], markdown: bool) -> None:
    """The first table: each method at its best rate, and how wide the good rates are."""
    rows = []
    for model in MODELS:
        for method in METHODS:
            rates = content[model][method]["rates"]
            best = best_rate(rates)
            top = np.mean(rates[best]["accuracy"])
            good = [r for r in rates if np.mean(rates[r]["accuracy"]) > top - 0.01]
            losses = [math.inf if x is None else x for x in rates[best]["loss"]]
            rows.append((model, method, best, rates[best]["accuracy"], losses, good))
    columns = [
        Column("model", lambda row: row[0]),
        Column("method", lambda row: row[1]),
        Column("best rate", lambda row: row[2]),
        Column("test accuracy", lambda row: f"{100 * np.mean(row[3]):.1f}%"),
        Column("range", lambda row: f"{100 * np.ptp(row[3]):.1f}%"),
        Column("training loss", lambda row: f"{np.mean(row[4]):.4f}"),
        Column("rates within 1%", lambda row: f"{row[5][0]} to {row[5][-1]}"),
    ]
    print_columns("Each at its best learning rate", rows, columns, markdown)


def print_equal(content: dict[str, Any], markdown: bool) -> None:
    """The second table: NAG-GS with a constant gamma, and the heavy ball that it is."""
    rows = [(m, alpha, row) for m in MODELS for alpha, row in content[m].items()]
    accuracy = lambda row, name: f"{100 * np.mean(row[2]['each'][name]['accuracy']):.1f}%"
    gap = lambda row: row[2]["largest_gap_of_batch_losses"]
    columns = [
        Column("model", lambda row: row[0]),
        Column("α", lambda row: row[1]),
        Column("learning rate", lambda row: f"{row[2]['learning_rate']:.4f}"),
        Column("momentum", lambda row: f"{row[2]['momentum']:.3f}"),
        Column("NAG-GS", lambda row: accuracy(row, "NAG-GS")),
        Column("SGD", lambda row: accuracy(row, "SGD")),
        Column("largest gap of losses", lambda row: "-" if gap(row) is None else f"{gap(row):.1g}"),
    ]
    print_columns("At equal learning rate and momentum", rows, columns, markdown)


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "digits_optimizers.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    setting = {"steps": args.steps, "seeds": args.seeds, "batch_size": 64, "mu": MU, "gamma": GAMMA}
    results = Results(args.output, setting, args.log)
    for model in MODELS:
        for method in METHODS:
            run = lambda model=model, method=method: grid(model, method, args.seeds, args.steps)
            results.once(("grid", model, method), run)
        run = lambda model=model: equal(model, args.seeds, args.steps)
        results.once(("equal", model), run)
    print_grid(results.content["grid"], args.markdown)
    print()
    print_equal(results.content["equal"], args.markdown)


if __name__ == "__main__":
    main()
