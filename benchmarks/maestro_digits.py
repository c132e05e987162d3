"""Maestro on scikit-learn's digits: accuracy against rank, and ranks found on a linear regression.

    python benchmarks/maestro_digits.py             # whatever is missing in the results file
    python benchmarks/maestro_digits.py --markdown  # the tables as Markdown

An MLP 64-128-128-10 with layers of full rank is trained by SGD with and without sampled ranks and
penalty, and a dense one beside it. Then each layer is cut to a rank: to the first directions, or to
those of the SVD of its weight. Some four minutes of a core; a stopped run goes on after the last
result.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

from digits import load
from family_table import Column, print_columns
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from projection_family import RESULTS, Results

from lowrank_optax.layers import maestro

RANKS = (4, 8, 16, 32)
THRESHOLD, BATCH, PEAK = 1e-5, 128, 0.05
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"factors": False},
    "factors, all directions in each step": {"sampled": False},
    "sampled ranks": {},
    "sampled ranks, penalty 3e-4": {"penalty": 3e-4},
    "sampled ranks, penalty 1e-3": {"penalty": 1e-3},
}
TRUE_RANK, PENALTIES = 5, (0.0, 1e-3, 1e-2)


class Network(nnx.Module):
    """An MLP 64-128-128-10."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``[n, 10]`` of pixels ``[n, 64]``."""
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


def mean_loss(model: nnx.Module, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


def fit(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    loss: Any,
    seed: int,
    steps: int,
    *,
    penalty: float = 0.0,
    sampled: bool = True,
) -> None:
    """Trains a model in place on the loss of a model and a key, and sets its ranks."""
    has_ranks = bool(jax.tree.leaves(nnx.state(model, maestro.Rank)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        batch, draw = jax.random.split(key)

        def whole_loss(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params, rest, copy=True)
            if not has_ranks:
                return loss(model, batch)
            pressed = penalty * maestro.penalty(model) if penalty else 0.0
            ranks = maestro.important_ranks(model, THRESHOLD)
            maestro.set_ranks(model, maestro.sample_ranks(draw, ranks) if sampled else ranks)
            return loss(model, batch) + pressed

        updates, state = tx.update(jax.grad(whole_loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed), steps)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    params, _ = run((params, tx.init(params)))
    nnx.update(model, params)
    if has_ranks:
        maestro.shrink(model, THRESHOLD)


def accuracy(model: nnx.Module) -> float:
    """Share of the test images whose largest logit is their label's, in %."""
    test = load().test
    found = model(test.images.reshape(-1, 64)).argmax(-1)
    return round(100 * float((found == test.labels).mean()), 2)


def on_digits(
    seed: int, steps: int, *, factors: bool = True, sampled: bool = True, penalty: float = 0.0
) -> dict[str, Any]:
    """Accuracies of a trained network, whole and cut to ranks; its own ranks and its weights."""
    data = load().train
    images = data.images.reshape(-1, 64)

    def loss(model: nnx.Module, key: jax.Array) -> jax.Array:
        chosen = jax.random.randint(key, (BATCH,), 0, len(data.labels))
        return mean_loss(model, images[chosen], data.labels[chosen])

    model = Network(nnx.Rngs(seed))
    if factors:
        maestro.convert(model, "")
    sgd = optax.sgd(optax.cosine_decay_schedule(PEAK, steps), momentum=0.9)
    tx = optax.chain(optax.clip_by_global_norm(1.0), sgd)
    fit(model, tx, loss, seed, steps, penalty=penalty, sampled=sampled)
    found: dict[str, Any] = {"full": accuracy(model)}
    if not factors:
        maestro.convert(model, "")
    for method in ("prefix", "svd") if factors else ("svd",):
        cut = lambda rank, method=method: maestro.truncate(copy.deepcopy(model), rank, method)
        found[method] = [accuracy(cut(rank)) for rank in RANKS]
    ranks = maestro.current_ranks(model)
    found["ranks"] = [int(ranks[name]) for name in ("first", "second", "head")]
    maestro.compact(model)
    weights = [x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)) if x.ndim > 1]
    return found | {"weights": sum(weights)}


def on_regression(seed: int, steps: int, penalty: float) -> dict[str, Any]:
    """Rank found by a layer 32 → 24 that learns a matrix of a lower rank; its relative error."""
    keys = jax.random.split(jax.random.key(seed), 2)
    target = jax.random.normal(keys[0], (32, TRUE_RANK)) @ jax.random.normal(
        keys[1], (TRUE_RANK, 24)
    )
    target /= jnp.linalg.norm(target, 2)

    def loss(model: nnx.Module, key: jax.Array) -> jax.Array:
        x = jax.random.normal(key, (BATCH, 32))
        return jnp.mean(jnp.sum((model(x) - x @ target) ** 2, -1))

    model = nnx.Sequential(nnx.Linear(32, 24, use_bias=False, rngs=nnx.Rngs(seed)))
    maestro.convert(model, "")
    rate = optax.cosine_decay_schedule(PEAK, steps, alpha=0.01)
    # Its proximal steps make exact zeros; the penalty in the loss would only come near.
    tx = optax.chain(optax.sgd(rate), maestro.prox(rate, penalty))
    fit(model, tx, loss, seed, steps)
    weight = maestro.merge(copy.deepcopy(model)).layers[0].kernel[...]
    error = float(jnp.linalg.norm(weight - target) / jnp.linalg.norm(target))
    (rank,) = maestro.current_ranks(model).values()
    return {"rank": int(rank), "error": round(error, 4)}


def by_seed(measure: Any, seeds: int) -> dict[str, Any]:
    """The figures of every seed, by name."""
    found = [measure(seed) for seed in range(seeds)]
    return {name: [each[name] for each in found] for name in found[0]}


def print_tables(content: dict[str, Any], markdown: bool) -> None:
    """Mean accuracies over seeds, and the ranks that were found."""
    mean = lambda values: f"{np.mean(values):.1f}"

    def cell(index: int) -> Any:
        def text(row: Any) -> str:
            svd = mean(np.array(row[1]["svd"])[:, index])
            prefix = row[1].get("prefix")
            return f"({svd})" if prefix is None else f"{mean(np.array(prefix)[:, index])} ({svd})"

        return text

    columns = [
        Column("trained as", lambda row: row[0]),
        *(Column(f"rank {rank}", cell(index)) for index, rank in enumerate(RANKS)),
        Column("whole", lambda row: mean(row[1]["full"])),
        Column("ranks of the first seed", lambda row: ", ".join(map(str, row[1]["ranks"][0]))),
        Column("weights", lambda row: f"{np.mean(row[1]['weights']):,.0f}"),
    ]
    title = "Test accuracy in % with the first directions (with those of the SVD), mean of seeds"
    print_columns(title, list(content["digits"].items()), columns, markdown)
    columns = [
        Column("penalty", lambda row: row[0]),
        Column("rank found", lambda row: ", ".join(map(str, row[1]["rank"]))),
        Column("relative error", lambda row: ", ".join(f"{x:.4f}" for x in row[1]["error"])),
    ]
    title = f"A regression of rank {TRUE_RANK}, by seed"
    print_columns(title, list(content["regression"].items()), columns, markdown)


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "maestro_digits.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    setting = {"steps": args.steps, "seeds": args.seeds, "batch_size": BATCH}
    results = Results(args.output, setting, args.log)
    for name, options in VARIANTS.items():
        measure = lambda seed, options=options: on_digits(seed, args.steps, **options)
        results.once(("digits", name), lambda m=measure: by_seed(m, args.seeds))
    for penalty in PENALTIES:
        measure = lambda seed, penalty=penalty: on_regression(seed, args.steps, penalty)
        results.once(("regression", f"{penalty:g}"), lambda m=measure: by_seed(m, args.seeds))
    print_tables(results.content, args.markdown)


if __name__ == "__main__":
    main()
