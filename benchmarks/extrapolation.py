"""Extrapolation with a large batch: SGD with Nesterov's momentum, eight workers, on digits.

    python benchmarks/extrapolation.py             # whatever is missing in the results file
    python benchmarks/extrapolation.py --markdown  # the table as Markdown

A small residual network, from each seed, at every pair of a learning rate and an inner one; the
eight workers of a batch take their turn on one device. The table gives the training loss at fixed
epochs, of each variant and inner rate at the learning rate that ends lowest. Some six minutes of
one core; a stopped run goes on after the last pair.
"""

import argparse
from collections.abc import Callable
import functools
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

WORKERS, MOMENTUM = 8, 0.9
CHANNELS, BLOCKS = 8, 1
LEARNING_RATES = (0.03, 0.1, 0.3)
# Inner rates, as shares of the learning rate: a worker's own rate is an eighth. Noise is a share of
# the norms of columns, times the root of their length.
SHARES = {
    "none": (0.0,),
    "past_local": (0.125, 0.5, 1.0),
    "past_global": (0.125,),
    "same": (0.125, 0.5),
    "noise": (0.02, 0.125),
}
Run = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def trainer(variant: Any, batch_size: int, epochs: int, every: int) -> Run:
    """Makes ``(seed, rate, inner rate) -> (losses at the epochs, test accuracy)`` of seeds."""
    model, data = digits.cnn(CHANNELS, BLOCKS), digits.load()
    loss = functools.partial(digits.loss, model)
    steps = round(every * len(data.train.labels) / batch_size)

    def run(seed: jax.Array, rate: jax.Array, inner: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights_key, batches_key = jax.random.split(jax.random.key(seed))
        tx = optax.sgd(rate, MOMENTUM, nesterov=True)
        ahead = lro.extrapolated_value_and_grad(
            loss, variant, inner, local_groups=WORKERS, filter_normalized=True
        )

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, opt_state, state = carry
            batch = digits.batch_at(data.train, key, batch_size)
            parts = jax.tree.map(lambda x: x.reshape(WORKERS, -1, *x.shape[1:]), batch)
            _, gradient, state = ahead(params, state, parts)
            updates, opt_state = tx.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, state), None

        def epochs_between(carry: Any, keys: jax.Array) -> tuple[Any, jax.Array]:
            carry, _ = jax.lax.scan(step, carry, keys)
            return carry, loss(carry[0], data.train)

        params = model.init(weights_key)
        carry = params, tx.init(params), ahead.init(params)
        keys = jax.random.split(batches_key, (epochs // every, steps))
        (params, *_), losses = jax.lax.scan(epochs_between, carry, keys)
        return losses, digits.accuracy(model, params, data.test)

    return jax.jit(jax.vmap(run, in_axes=(0, None, None)))


def figures(run: Run, rate: float, share: float, seeds: int) -> dict[str, Any]:
    """The losses ``[seeds][epochs]`` and accuracies of a pair of rates; None if not finite."""
    began = time.perf_counter()
    losses, accuracy = run(jnp.arange(seeds), jnp.float32(rate), jnp.float32(share * rate))
    finite = lambda x: float(f"{x:.4g}") if math.isfinite(x) else None
    return {
        "losses": [[finite(x) for x in row] for row in np.asarray(losses).tolist()],
        "accuracy": [round(x, 4) for x in np.asarray(accuracy).tolist()],
        "seconds": round(time.perf_counter() - began, 1),
    }


def losses_of(pair: dict[str, Any]) -> np.ndarray:
    """The losses ``[seeds, epochs]``; infinite where a run diverged."""
    return np.array([[math.inf if x is None else x for x in row] for row in pair["losses"]])


def print_table(content: dict[str, Any], epochs: int, every: int, markdown: bool) -> None:
    """Each variant and inner rate at the learning rate that ends lowest, and at the others."""
    rows = []
    for variant, shares in content.items():
        for share, rates in shares.items():
            ends = {rate: losses_of(pair)[:, -1].mean() for rate, pair in rates.items()}
            best = min(ends, key=lambda rate: ends[rate])
            rows.append((variant, share, best, rates[best], ends))
    at = lambda epoch: Column(
        f"epoch {epoch}", lambda row: f"{losses_of(row[3])[:, epoch // every - 1].mean():.4f}"
    )
    last = lambda row: losses_of(row[3])[:, -1]
    shown = (every, max(every, epochs // 2 // every * every), epochs)
    columns = [
        Column("variant", lambda row: row[0]),
        Column("inner / rate", lambda row: row[1] if row[0] != "none" else "-"),
        Column("best rate", lambda row: row[2]),
        *(at(epoch) for epoch in dict.fromkeys(shown)),
        Column("range", lambda row: f"{last(row).max() - last(row).min():.4f}"),
        Column("test accuracy", lambda row: f"{100 * np.mean(row[3]['accuracy']):.1f}%"),
        Column("last, by rate", lambda row: ", ".join(f"{x:.3g}" for x in row[4].values())),
    ]
    print_columns("Training loss, mean of seeds", rows, columns, markdown)


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="epochs between evaluations")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "extrapolation.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    if args.batch_size % WORKERS or args.epochs % args.every:
        parser.error(f"--batch-size is a multiple of {WORKERS}, and --epochs of --every")
    setting = {"epochs": args.epochs, "every": args.every, "batch_size": args.batch_size}
    setting |= {"seeds": args.seeds, "workers": WORKERS, "momentum": MOMENTUM}
    results = Results(args.output, setting, args.log)
    make = functools.cache(lambda v: trainer(v, args.batch_size, args.epochs, args.every))
    for variant, shares in SHARES.items():
        for share in shares:
            for rate in LEARNING_RATES:
                run = lambda v=variant, rate=rate, s=share: figures(make(v), rate, s, args.seeds)
                results.once(("runs", variant, f"{share:g}", f"{rate:g}"), run)
    print_table(results.content["runs"], args.epochs, args.every, args.markdown)


if __name__ == "__main__":
    main()
