"""What weight decay does to the main job's model, and what bfloat16 loses of it.

    python benchmarks/weight_decay.py             # whatever is missing in the results file
    python benchmarks/weight_decay.py --markdown  # the tables as Markdown

AdamW on the main job's text, with weights in float32, and in bfloat16 rounded to the nearest, at
random or with compensation; then in float32 with more and less decay, and a learning rate that
stays. `monitor_weight_decay` measures it all. Learning rates and decays are data: one program is
compiled for each way of keeping weights. A stopped run goes on where it was.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
import time
from typing import Any

from family_table import Column, print_columns
import jax.numpy as jnp
import numpy as np
import optax
from projection_family import RESULTS, Results
from training_runs import (
    CHUNK,
    TUNED,
    Settings,
    Text,
    Trainer,
    Weights,
    held_out_windows,
    in_few_bits,
)

import lowrank_optax as lro

# What differs from the main job's settings.
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16 nearest": {"rounding": "nearest", "dtype": "bfloat16"},
    "bf16 stochastic": {"rounding": "stochastic", "dtype": "bfloat16"},
    "bf16 compensated": {"rounding": "compensated", "dtype": "bfloat16"},
}
# Precision, schedule and decay of each run.
OF_PRECISIONS = [(name, "cosine", decay) for name in PRECISIONS for decay in (0.0, 0.1)]
OF_SCHEDULES = [
    ("float32", schedule, decay) for schedule in ("cosine", "constant") for decay in (0.0, 0.1, 0.3)
]
KEPT = (
    "weight_norm",
    "rotation",
    "rotation_ratio",
    "norm_ratio",
    "decay_share",
    "rounding_loss",
    "decay_lost",
)


class MonitoredRuns:
    """Runs of AdamW with one way of keeping weights, measured at the start of every chunk."""

    def __init__(self, precision: str, settings: Settings) -> None:
        settings = dataclasses.replace(settings, **PRECISIONS[precision])
        mask, b2 = lro.training.decay_mask(), TUNED["adamw"]["b2"]

        def make(rates: Any) -> optax.GradientTransformation:
            """The optimizer for rates ``[learning rate, weight decay]`` by step."""
            rate, decay = (lambda count: rates(count)[0]), (lambda count: rates(count)[1])
            adamw = optax.adamw(rate, b2=b2, weight_decay=decay, mask=mask)
            monitor = lro.training.monitor_weight_decay(
                every=CHUNK,
                learning_rate=rate,
                weight_decay=decay,
                weight_decay_mask=mask,
                per_layer=False,
            )
            return optax.chain(in_few_bits(adamw, settings), monitor)

        self.trainer = Trainer(Text.load(settings), make, Weights())

    def run(
        self, seed: int, peak: float, steps: int, schedule: str, decay: float
    ) -> dict[str, Any]:
        """Trains; returns losses, and measurements of the matrices by chunk and their means."""
        began, trainer = time.perf_counter(), self.trainer
        carry, losses, seen = trainer.start(seed), jnp.zeros(0), []
        for done, (tokens, rates) in enumerate(trainer.inputs(seed, peak, steps)):
            if schedule == "constant":
                warmed = (CHUNK * done + np.arange(1, CHUNK + 1)) / max(steps // 10, 1)
                rates = peak * np.minimum(warmed, 1.0)
            both = jnp.stack([jnp.asarray(rates, jnp.float32), jnp.full(CHUNK, decay)], -1)
            carry, losses = trainer.chunk(carry, tokens, both)
            seen.append(lro.training.measurements(carry[1])["matrices"])
        windows = jnp.asarray(held_out_windows(trainer.text.corpus, trainer.text.settings))
        history = {name: [numbers[name] for numbers in seen] for name in KEPT}
        means = {name: mean(values) for name, values in history.items()}
        return {
            "held_out_loss": finite(trainer.evaluate(carry[0], windows)),
            "training_loss": finite(losses.mean()),
            "means": means,
            "history": history,
            "seconds": round(time.perf_counter() - began, 1),
        }


def finite(x: Any) -> float | None:
    """A number for the results file, None for one that JSON does not know."""
    return float(x) if np.isfinite(x) else None


def mean(values: list[float | None]) -> float | None:
    """Over the chunks but the first, which warm-up begins; None if one of them has none."""
    later = values[1:] or values
    return None if None in later else float(np.mean(np.asarray(later, float)))


def columns(results: dict[str, Any]) -> list[Column]:
    """The columns of both tables; a row is a list of runs, one for each seed."""
    runs = lambda row: list(results[key(*row)].values())
    average = lambda row, read: np.mean([read(run) for run in runs(row)])

    def share(name: str) -> Any:
        values = lambda row: [run["means"][name] for run in runs(row)]
        return lambda row: "–" if None in values(row) else f"{np.mean(values(row)):.3f}"

    loss = lambda run: np.inf if run["held_out_loss"] is None else run["held_out_loss"]
    return [
        Column("weights", lambda row: row[0]),
        Column("schedule", lambda row: row[1]),
        Column("decay", lambda row: f"{row[2]:g}"),
        Column("held-out loss", lambda row: f"{average(row, loss):.4f}"),
        Column(
            "norm", lambda row: f"{average(row, lambda run: run['history']['weight_norm'][-1]):.2f}"
        ),
        Column("rotation", share("rotation")),
        Column("of equilibrium", share("rotation_ratio")),
        Column("decay share", share("decay_share")),
        Column("rounding loss", share("rounding_loss")),
        Column("decay lost", share("decay_lost")),
    ]


def key(precision: str, schedule: str, decay: float) -> str:
    """A run's name in the results file."""
    return f"{precision}, {schedule}, decay {decay:g}"


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="the peak")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "weight_decay.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    if args.steps % CHUNK:
        parser.error(f"--steps must be a multiple of {CHUNK}, not {args.steps}")
    settings = Settings(batch_size=args.batch_size, sequence_length=args.sequence_length, devices=1)
    setting = {"model": settings.model, "batch_size": args.batch_size} | {
        "sequence_length": args.sequence_length,
        "steps": args.steps,
        "learning_rate": args.learning_rate,
    }
    results = Results(args.output, setting, args.log)
    runs_of = functools.cache(functools.partial(MonitoredRuns, settings=settings))
    tables = {"precision of the weights": OF_PRECISIONS, "schedule and decay": OF_SCHEDULES}
    for row in dict.fromkeys(row for rows in tables.values() for row in rows):
        precision, *rest = row
        for seed in range(args.seeds):
            run = lambda p=precision, s=seed, r=rest: runs_of(p).run(
                s, args.learning_rate, args.steps, *r
            )
            results.once(("runs", key(*row), f"seed {seed}"), run)
    for title, rows in tables.items():
        shape = f"{args.steps} steps of {args.batch_size} × {args.sequence_length} tokens"
        shown = columns(results.content["runs"])
        print_columns(f"{settings.model}, {shape}: {title}", rows, shown, args.markdown)
        print()


if __name__ == "__main__":
    main()
