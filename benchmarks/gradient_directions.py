"""Direction rules and NAG-GS against tuned AdamW on the main job, at a small and a large batch.

    python benchmarks/gradient_directions.py             # whatever is missing in the results file
    python benchmarks/gradient_directions.py --markdown  # the table as Markdown

Trains the main job's model on its text. Each optimizer's learning rate is tuned at each batch size,
on seed 0 and at the full number of steps; two more seeds follow at the best rate. NAG-GS has
`mu = gamma = 0.1`, with which its rate alpha acts as SGD's at `10 (alpha / (1 + alpha))**2`, with
momentum `1 / (1 + alpha)**2`: from 0.008 and 0.94 to 0.37 and 0.65 within the rates tried first. A
stopped run goes on where it was. All of it takes 42 runs, more where the best rate is at an end.
"""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

from family_table import Column, print_columns
import numpy as np
from projection_family import CHUNK, RESULTS, Results
from training_runs import Settings, Text, Trainer, Weights, choose, make_optimizer

# The learning rates tried first; beyond an end that is the best, the series goes on.
RATES = {
    "adamw": (2e-3, 4e-3, 8e-3),
    "grams": (2e-3, 4e-3, 8e-3),
    "cautious_adamw": (2e-3, 4e-3, 8e-3),
    "nag_gs": (0.03, 0.06, 0.12, 0.24),
}
OPTIONS = ("b2=0.95", "weight_decay=0.0", "nag_gs.mu=0.1", "nag_gs.gamma=0.1")


class Batch:
    """A batch size, how many steps of it are made, and the trainers for it."""

    def __init__(self, size: int, steps: int, length: int, results: Results) -> None:
        self.results, self.size, self.steps, self.length = results, size, steps, length
        self.trainer = functools.cache(self._trainer)

    @property
    def name(self) -> str:
        return f"{self.size} × {self.length}, {self.steps} steps"

    def loss(self, name: str, peak: float, seed: int = 0) -> float:
        """The held-out loss of a run; infinite if it diverged."""
        run = lambda: self.trainer(name).run(seed, peak, self.steps)
        figures = self.results.once((self.name, name, f"rate {peak:g}", f"seed {seed}"), run)
        return math.inf if figures["held_out_loss"] is None else figures["held_out_loss"]

    def tune(self, name: str) -> float:
        """The learning rate with the least held-out loss on seed 0."""
        rates = list(RATES[name])
        for _ in range(3):
            best = min(rates, key=lambda rate: self.loss(name, rate))
            if best == rates[0]:
                rates.insert(0, best / 2)
            elif best == rates[-1]:
                rates.append(best * 2)
            else:
                break
        return min(rates, key=lambda rate: self.loss(name, rate))

    @functools.cached_property
    def text(self) -> Text:
        return Text.load(Settings(batch_size=self.size, sequence_length=self.length, devices=1))

    def _trainer(self, name: str) -> Trainer:
        mine = [option for option in OPTIONS if _is_option_of(option, name)]
        chosen = choose([name], mine, 1.0)[0]
        make = lambda schedule: make_optimizer(chosen, self.text.model, self.text.params, schedule)
        return Trainer(self.text, make, Weights())


def _is_option_of(option: str, name: str) -> bool:
    owner = option.partition("=")[0].rpartition(".")[0]
    return owner == name if owner else name != "nag_gs"


def row(batch: Batch, name: str, seeds: int) -> dict[str, Any]:
    """The losses of an optimizer at its best rate."""
    rate = batch.tune(name)
    losses = np.array([batch.loss(name, rate, seed) for seed in range(seeds)])
    return {"batch": batch.name, "name": name, "rate": rate, "losses": losses}


def columns(rows: list[dict[str, Any]]) -> list[Column]:
    """The columns of the table; each optimizer beside AdamW from the same seeds."""
    adamw = {row["batch"]: row["losses"] for row in rows if row["name"] == "adamw"}
    against = lambda row: 100 * (row["losses"] / adamw[row["batch"]] - 1)
    return [
        Column("batch", lambda row: row["batch"]),
        Column("optimizer", lambda row: row["name"]),
        Column("held-out loss", lambda row: f"{row['losses'].mean():.4f}"),
        Column("range", lambda row: f"{np.ptp(row['losses']):.4f}"),
        Column("to AdamW", lambda row: f"{against(row).mean():+.2f}%"),
        Column("each seed", lambda row: ", ".join(f"{x:+.2f}" for x in against(row))),
        Column("rate", lambda row: f"{row['rate']:g}"),
    ]


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=int, nargs=2, default=(4, 400), metavar=("BATCH", "STEPS"))
    parser.add_argument("--large", type=int, nargs=2, default=(32, 100), metavar=("BATCH", "STEPS"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "gradient_directions.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    for _, steps in (args.small, args.large):
        if steps % CHUNK:
            parser.error(f"steps must be a multiple of {CHUNK}, not {steps}")
    settings = Settings()
    setting = {"model": settings.model, "eval_sequences": settings.eval_sequences}
    results = Results(args.output, setting | {"options": list(OPTIONS)}, args.log)
    batches = [
        Batch(size, steps, args.sequence_length, results)
        for size, steps in (args.small, args.large)
    ]
    rows = [row(batch, name, args.seeds) for batch in batches for name in RATES]
    print_columns(f"{settings.model}, batch × length", rows, columns(rows), args.markdown)


if __name__ == "__main__":
    main()
