"""A miniature of the papers' tables: the projected optimizers and their baselines on the main job.

    python benchmarks/projection_family.py                # the methods, and low-rank weights
    python benchmarks/projection_family.py --grid         # subspace × residual × refresh
    python benchmarks/projection_family.py --markdown     # the table as Markdown

Tunes each method's learning rate on one seed in shorter runs, trains with it from each seed, and
then times all of them in turn. What the results file holds already is not run again, so a stopped
run goes on where it was; with all of it there, the table is only printed.
"""

import argparse
import math
from pathlib import Path
import time
from typing import Any

import family_grid
from family_table import Column, print_columns
import jax
from low_rank_weights import factorize, multiply
import numpy as np
import optax
from timing import milliseconds
from training_runs import (
    CHUNK,
    TUNED,
    MakeOptimizer,
    Settings,
    Text,
    Trainer,
    Weights,
    choose,
    make_optimizer,
    read_json,
    write_json,
)

from lowrank_optax.matrices import resolve_dimension_numbers

RANK, TUNING_STEPS = TUNED["galore"]["rank"], 300
LOW_RANK_WEIGHTS = "low-rank weights"
# AdamW with the learning rates that `scale=0.25` gives: four times as high off the matrices.
SCALED_ADAMW = "adamw, matrices × 0.25"
# The learning rates tried first; beyond an end that is the best, the series goes on.
RATES = {
    "adamw": (2e-3, 4e-3, 8e-3),
    "galore": (1e-2, 2e-2, 4e-2),
    "fira": (5e-3, 1e-2, 2e-2),
    "adarankgrad": (1e-2, 2e-2, 4e-2),
    "online_subspace_descent": (1e-2, 2e-2, 4e-2),
    "dct_adamw": (2.5e-3, 5e-3, 1e-2),
    "apollo": (5e-3, 1e-2, 2e-2),
    "apollo_mini": (2.5e-3, 5e-3, 1e-2),
    "ldadam": (2e-3, 4e-3, 8e-3),
    LOW_RANK_WEIGHTS: (2e-3, 4e-3, 8e-3),
    SCALED_ADAMW: (1e-2, 2e-2, 4e-2),
}
RESULTS = Path(__file__).parent / "results"


class Family:
    """The methods by name, each with a trainer made when it is first needed."""

    def __init__(self, settings: Settings) -> None:
        self.text = Text.load(settings)
        self.trainers: dict[str, Trainer] = {}

    def trainer(self, name: str) -> Trainer:
        """The trainer of a method."""
        if name not in self.trainers:
            text, weights = self.text, Weights()
            if name == LOW_RANK_WEIGHTS:
                weights = Weights(
                    lambda key, params: factorize(key, params, text.rule, RANK),
                    lambda factors: multiply(factors, text.params, text.rule),
                )
            self.trainers[name] = Trainer(text, self._optimizer(name), weights)
        return self.trainers[name]

    def _optimizer(self, name: str) -> MakeOptimizer:
        """The main job's optimizer of that name, or one of the baselines."""
        text = self.text
        if name == SCALED_ADAMW:
            specs = resolve_dimension_numbers(text.rule, text.params)
            matrices = jax.tree.structure(text.params).unflatten(spec is not None for spec in specs)
            return lambda schedule: optax.chain(
                optax.scale_by_adam(b2=TUNED["adamw"]["b2"]),
                optax.masked(optax.scale(0.25), matrices),
                optax.scale_by_learning_rate(schedule),
            )
        chosen = choose(["adamw" if name == LOW_RANK_WEIGHTS else name], [], 1.0)[0]
        return lambda schedule: make_optimizer(chosen, text.model, text.params, schedule)


class Results:
    """The results file: figures by keys, written after each of them."""

    def __init__(self, path: Path, setting: dict[str, Any], log: Path | None) -> None:
        """Opens the file, or begins it.

        Raises:
          SystemExit: If it holds results of another setting.
        """
        self.path, self.log = path, log
        self.content = read_json(path) or {"setting": setting}
        if self.content["setting"] != setting:
            raise SystemExit(f"{path} is of another setting, {self.content['setting']}")

    def once(self, keys: tuple[str, ...], measure: Any) -> Any:
        """What the file holds under the keys; `measure()`, which is then kept, if nothing."""
        place = self.content
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        if keys[-1] not in place:
            place[keys[-1]] = measure()
            self.path.parent.mkdir(exist_ok=True)
            write_json(self.path, self.content)
            self.note(f"{' '.join(keys)}: {place[keys[-1]]}")
        return place[keys[-1]]

    def note(self, line: str) -> None:
        print(line, flush=True)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def run_once(
    results: Results, family: Family, name: str, peak: float, seed: int, steps: int
) -> dict[str, Any]:
    """The figures of one run."""
    key = f"rate {peak:g}, seed {seed}, {steps} steps"
    run = lambda: family.trainer(name).run(seed, peak, steps)
    return results.once(("runs", name, key), run)


def tune(results: Results, family: Family, name: str, steps: int) -> float:
    """The learning rate with the least held-out loss on seed 0."""

    def loss(peak: float) -> float:
        figures = run_once(results, family, name, peak, 0, steps)
        return math.inf if figures["held_out_loss"] is None else figures["held_out_loss"]

    rates = list(RATES[name])
    for _ in range(3):
        best = min(rates, key=loss)
        if best == rates[0]:
            rates.insert(0, best / 2)
        elif best == rates[-1]:
            rates.append(best * 2)
        else:
            break
    return min(rates, key=loss)


def settle(results: Results, family: Family, name: str, rate: float, steps: int) -> float:
    """The better of a rate that is best in short runs and its half, which long ones may prefer."""
    loss = lambda peak: run_once(results, family, name, peak, 0, steps)["held_out_loss"] or math.inf
    return min((rate, rate / 2), key=loss)


def time_all(family: Family, names: list[str], rounds: int) -> dict[str, float]:
    """Median milliseconds of a step, refreshes included, all methods taking turns."""

    def stepper(name: str) -> Any:
        trainer = family.trainer(name)
        carry = [trainer.start(0)]
        tokens, rates = next(trainer.inputs(0, 1e-4, CHUNK))

        def step() -> float:
            began = time.perf_counter()
            carry[0] = jax.block_until_ready(trainer.chunk(carry[0], tokens, rates)[0])
            return (time.perf_counter() - began) / CHUNK

        return step

    return milliseconds({name: stepper(name) for name in names}, rounds)


def columns(names: list[str], results: Results, rates: dict[str, float], steps: int) -> Any:
    """Rows and columns of the table, from what the results hold; the first row is AdamW's."""
    rows = []
    for name in names:
        mark = f"rate {rates[name]:g},"
        runs = [
            figures
            for key, figures in results.content.get("runs", {}).get(name, {}).items()
            if key.startswith(mark) and key.endswith(f" {steps} steps")
        ]
        losses = [r["held_out_loss"] for r in runs if r["held_out_loss"] is not None]
        if losses:
            rows.append((name, losses, runs[0], rates[name]))
    first = float(np.mean(rows[0][1]))
    times = results.content.get("milliseconds", {})
    return rows, [
        Column("method", lambda row: row[0]),
        Column("loss", lambda row: f"{np.mean(row[1]):.4f}"),
        Column("to AdamW", lambda row: f"{100 * (np.mean(row[1]) / first - 1):+.1f}%"),
        Column("range", lambda row: f"{max(row[1]) - min(row[1]):.4f}"),
        Column("seeds", lambda row: str(len(row[1]))),
        Column("state", lambda row: f"{row[2]['state_bytes'] / 1e6:.3f}"),
        Column("weights", lambda row: f"{row[2]['weight_bytes'] / 1e6:.3f}"),
        Column("ms", lambda row: f"{times[row[0]]:.1f}" if row[0] in times else "–"),
        Column("rate", lambda row: f"{row[3]:g}"),
    ]


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--steps", type=int, help="of a run (default: 1000; 150 with --grid)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 leaves it out")
    parser.add_argument("--grid", action="store_true", help="subspace × residual × refresh")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--output", type=Path, help="the results file")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    steps = args.steps or (150 if args.grid else 1000)
    if steps % CHUNK:
        parser.error(f"--steps must be a multiple of {CHUNK}, not {steps}")
    settings = Settings(batch_size=args.batch_size, sequence_length=args.sequence_length, devices=1)
    names = ["model", "batch_size", "sequence_length", "eval_sequences"]
    setting = {name: getattr(settings, name) for name in names} | {"rank": RANK}
    path = args.output or RESULTS / f"projection_{'grid' if args.grid else 'family'}.json"
    results = Results(path, setting, args.log)
    family = Family(settings)
    if args.grid:
        family_grid.run(results, family.text, steps)
        family_grid.show(results, steps, args.markdown)
        return
    rates = {name: tune(results, family, name, min(steps, TUNING_STEPS)) for name in args.methods}
    rates = {name: settle(results, family, name, rates[name], steps) for name in args.methods}
    for seed in range(args.seeds):
        for name in args.methods:
            run_once(results, family, name, rates[name], seed, steps)
    if args.rounds and set(args.methods) - set(results.content.get("milliseconds", {})):
        results.content.pop("milliseconds", None)
        results.once(("milliseconds",), lambda: time_all(family, args.methods, args.rounds))
    title = (
        f"{settings.model}, {steps} steps of {settings.batch_size} × {settings.sequence_length} "
        f"tokens, rank {RANK}: held-out loss, MB of state and of weights, ms a step"
    )
    print_columns(title, *columns(args.methods, results, rates, steps), args.markdown)


if __name__ == "__main__":
    main()
