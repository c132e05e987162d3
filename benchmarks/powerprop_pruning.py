"""Powerpropagation against plain training on scikit-learn's digits, after pruning by magnitude.

    python benchmarks/powerprop_pruning.py             # whatever is missing in the results file
    python benchmarks/powerprop_pruning.py --markdown  # the table as Markdown

An MLP of 64, 300, 100 and 10 units and a small residual network, trained by SGD with momentum 0.9.
Of each layer the largest weights are kept, of the output layer twice the share, and nothing is
trained after that, as in the official notebook. The learning rate of each exponent is the one with
the best accuracy at 10% of the weights on 300 images that are held out of the training set for it;
accuracies are those of the test images, for each seed. Some six minutes of one core; each model
and exponent is one compiled program for all rates and seeds, and a stopped run goes on after the
last.
"""

import argparse
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

MODELS = {"MLP": digits.mlp(), "residual network": digits.cnn(channels=8)}
ALPHAS = (1.0, 1.25, 1.5, 2.0, 3.0)
RATES = (0.01, 0.03, 0.1, 0.3)
KEPT = tuple(np.geomspace(0.01, 1.0, 9).tolist())
TUNED_AT = KEPT.index(min(KEPT, key=lambda keep: abs(keep - 0.1)))
VALIDATION = 300


def split() -> tuple[digits.Digits, digits.Digits, digits.Digits]:
    """Images to train on, to choose the learning rate by, and to report."""
    train, test = digits.load()
    part = lambda chosen: digits.Digits(*(x[chosen] for x in train))
    return part(slice(VALIDATION, None)), part(slice(VALIDATION)), test


def accuracies(model: digits.Model, weights: Any, data: digits.Digits) -> jax.Array:
    """With each of the shares `KEPT` of the weights."""

    def pruned(keep: float) -> jax.Array:
        masks = lro.layers.magnitude_masks(weights, keep, output="^out/kernel$", where="kernel$")
        return digits.accuracy(model, lro.layers.apply_masks(weights, masks), data)

    return jnp.stack([pruned(keep) for keep in KEPT])


def run_all(model: digits.Model, alpha: float, seeds: int, steps: int) -> dict[str, np.ndarray]:
    """Trains from every seed at every rate, all at once, and prunes.

    Returns:
      ``validation`` and ``test``, accuracies ``[rates, seeds, shares]``.
    """
    train, validation, test = split()
    pairs = jnp.repeat(jnp.array(RATES), seeds), jnp.tile(jnp.arange(seeds), len(RATES))
    to_weights = lambda theta: lro.layers.powerprop(theta, alpha)
    to_theta = lambda weights: lro.layers.powerprop_inverse(weights, alpha)

    def run(rate: jax.Array, seed: jax.Array) -> Any:
        tx = optax.sgd(rate, momentum=0.9)
        key = jax.random.key(seed)
        trained = digits.train(model, tx, key, train, steps, full=to_weights, start=to_theta)
        return to_weights(trained.params)

    def held(weights: Any) -> tuple[jax.Array, jax.Array]:
        return accuracies(model, weights, validation), accuracies(model, weights, test)

    weights = jax.jit(jax.vmap(run))(*pairs)
    # One after the other: all images of all runs at once would take gigabytes.
    found = jax.jit(lambda weights: jax.lax.map(held, weights))(weights)
    shaped = [np.asarray(x, np.float64).reshape(len(RATES), seeds, len(KEPT)) for x in found]
    return dict(zip(("validation", "test"), shaped, strict=True))


def tuned(model: str, alpha: float, seeds: int, steps: int) -> dict[str, Any]:
    """What the results hold of an exponent: its best rate, and accuracies there."""
    began = time.perf_counter()
    found = run_all(MODELS[model], alpha, seeds, steps)
    by_rate = found["validation"].mean(axis=1)[:, TUNED_AT]
    best = int(np.argmax(by_rate))
    return {
        "rate": RATES[best],
        "validation_by_rate": [round(float(x), 4) for x in by_rate],
        "accuracy": found["test"][best].round(4).tolist(),
        "seconds": round(time.perf_counter() - began, 1),
    }


def print_table(content: dict[str, Any], markdown: bool) -> None:
    """Test accuracies by the share that is kept, means over seeds."""
    rows = [(model, alpha, row) for model in MODELS for alpha, row in content[model].items()]
    mean = lambda row, i: 100 * np.mean(row[2]["accuracy"], axis=0)[i]
    spread = lambda row, i: 100 * np.ptp(row[2]["accuracy"], axis=0)[i]
    shares = [i for i, keep in enumerate(KEPT) if keep < 0.4 or keep == 1]
    columns = [
        Column("model", lambda row: row[0]),
        Column("α", lambda row: row[1]),
        Column("rate", lambda row: f"{row[2]['rate']:g}"),
        *(
            Column(f"{100 * KEPT[i]:.3g}%", lambda row, i=i: f"{mean(row, i):.1f}")
            for i in reversed(shares)
        ),
        Column("range at 10%", lambda row: f"{spread(row, TUNED_AT):.1f}"),
    ]
    print_columns("Test accuracy in % by the share of weights kept", rows, columns, markdown)


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "powerprop_pruning.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    setting = {"steps": args.steps, "seeds": args.seeds, "batch_size": 64, "rates": list(RATES)}
    results = Results(args.output, setting | {"kept": [round(k, 4) for k in KEPT]}, args.log)
    for model in MODELS:
        for alpha in ALPHAS:
            run = lambda m=model, a=alpha: tuned(m, a, args.seeds, args.steps)
            results.once((model, f"{alpha:g}"), run)
    print_table(results.content, args.markdown)


if __name__ == "__main__":
    main()
