"""What fewer bits kept for backward cost: the main job with few-bit SwiGLU and sketched linears.

    python benchmarks/few_bit_main_job.py             # whatever is missing in the results file
    python benchmarks/few_bit_main_job.py --markdown  # the tables as Markdown

Trains the main job's model on its text by AdamW from each seed, at the learning rate that is best
with exact gradients: fewer bits are to be dropped in, and nothing is tuned for them. A stopped run
goes on where it was.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

from family_table import Column, print_columns
import numpy as np
from projection_family import CHUNK, RESULTS, Results
from training_runs import Settings, Text, Trainer, Weights, choose, make_optimizer

LEARNING_RATE = 2e-3  # AdamW's best, as projection_family.py found it
EXACT = "exact"
# What differs from the main job's settings.
FEW_BIT: dict[str, dict[str, Any]] = {
    EXACT: {},
    **{f"{bits} bit{'s' * (bits > 1)}": {"activation_bits": bits} for bits in (1, 2, 3, 4)},
}
SKETCHED: dict[str, dict[str, Any]] = {
    f"{kind} {fraction}": {"sketch": fraction, "sketch_kind": kind}
    for fraction in (0.5, 0.2, 0.1)
    for kind in ("rows", "stratified", "gaussian")
}
METHODS = FEW_BIT | SKETCHED


def trainer_of(name: str, settings: Settings) -> Trainer:
    """The trainer of a method."""
    text = Text.load(dataclasses.replace(settings, **METHODS[name]))
    chosen = choose(["adamw"], [], 1.0)[0]
    return Trainer(
        text, lambda schedule: make_optimizer(chosen, text.model, text.params, schedule), Weights()
    )


def columns(names: list[str], runs: dict[str, Any]) -> tuple[list[str], list[Column]]:
    """Rows and columns of the table; each method beside exact gradients, seed by seed."""
    losses = {
        name: np.array([run["held_out_loss"] or np.inf for run in runs[name].values()])
        for name in dict.fromkeys([EXACT, *names])
    }
    against = lambda name: 100 * (losses[name] / losses[EXACT][: len(losses[name])] - 1)
    seconds = lambda name: np.mean([run["seconds"] for run in runs[name].values()])
    return names, [
        Column("kept for backward", lambda name: name),
        Column("held-out loss", lambda name: f"{losses[name].mean():.4f} ± {_std(losses[name])}"),
        Column("to exact", lambda name: f"{against(name).mean():+.2f}%"),
        Column("worst seed", lambda name: f"{against(name).max():+.2f}%"),
        Column("seconds", lambda name: f"{seconds(name):.0f}"),
    ]


def _std(losses: np.ndarray) -> str:
    return f"{losses.std(ddof=1):.4f}" if len(losses) > 1 else "–"


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "few_bit_main_job.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    if args.steps % CHUNK:
        parser.error(f"--steps must be a multiple of {CHUNK}, not {args.steps}")
    settings = Settings(batch_size=args.batch_size, sequence_length=args.sequence_length, devices=1)
    setting = {"model": settings.model, "batch_size": args.batch_size} | {
        "sequence_length": args.sequence_length,
        "eval_sequences": settings.eval_sequences,
        "steps": args.steps,
        "learning_rate": LEARNING_RATE,
    }
    results = Results(args.output, setting, args.log)
    trainer = functools.cache(functools.partial(trainer_of, settings=settings))
    for name in dict.fromkeys([EXACT, *args.methods]):
        for seed in range(args.seeds):
            run = lambda name=name, seed=seed: trainer(name).run(seed, LEARNING_RATE, args.steps)
            results.once(("runs", name, f"seed {seed}"), run)
    title = (
        f"{settings.model}, {args.steps} steps of {args.batch_size} × {args.sequence_length} tokens"
    )
    print_columns(title, *columns(args.methods, results.content["runs"]), args.markdown)


if __name__ == "__main__":
    main()
