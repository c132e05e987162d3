"""What fewer bits cost: AdamW and GaLore with states in 8 and 4 bits, and weights in bfloat16.

    python benchmarks/low_bit_states.py             # whatever is missing in the results file
    python benchmarks/low_bit_states.py --markdown  # the table as Markdown

Trains the main job's model on its text from each seed, at the learning rates that are best in
float32: fewer bits are to be dropped in, and nothing is tuned for them. A stopped run goes on where
it was.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

from family_table import Column, print_columns
import numpy as np
from projection_family import CHUNK, RESULTS, Results
from training_runs import (
    MakeOptimizer,
    Settings,
    Text,
    Trainer,
    Weights,
    choose,
    in_few_bits,
    make_optimizer,
)

# The best in float32, as projection_family.py found them.
LEARNING_RATES = {"adamw": 2e-3, "galore": 2e-2}
# What differs from the main job's settings; the optimizer before the comma.
METHODS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw, 8 bits": {"state_bits": 8},
    "adamw, 4 bits": {"state_bits": 4},
    "galore": {},
    "galore, 8 bits": {"state_bits": 8},
    "galore, 4 bits": {"state_bits": 4},
    "adamw, bf16 nearest": {"rounding": "nearest", "dtype": "bfloat16"},
    "adamw, bf16 stochastic": {"rounding": "stochastic", "dtype": "bfloat16"},
    "adamw, bf16 compensated": {"rounding": "compensated", "dtype": "bfloat16"},
    "adamw, 8 bits, bf16 stochastic": {
        "state_bits": 8,
        "rounding": "stochastic",
        "dtype": "bfloat16",
    },
}


def trainer_of(name: str, settings: Settings) -> Trainer:
    """The trainer of a method."""
    settings = dataclasses.replace(settings, **METHODS[name])
    text = Text.load(settings)
    chosen = choose([base(name)], [], 1.0)[0]
    make: MakeOptimizer = lambda schedule: in_few_bits(
        make_optimizer(chosen, text.model, text.params, schedule), settings
    )
    return Trainer(text, make, Weights())


def base(name: str) -> str:
    """The optimizer of a method."""
    return name.split(",")[0]


def columns(names: list[str], runs: dict[str, Any]) -> tuple[list[Any], list[Column]]:
    """Rows and columns of the table; each method beside its own optimizer in float32."""
    losses = {
        name: np.array([run["held_out_loss"] or np.inf for run in runs[name].values()])
        for name in names
    }
    bytes_of = lambda name, kind: next(iter(runs[name].values()))[f"{kind}_bytes"]
    against = lambda name: losses[name] / losses[base(name)][: len(losses[name])] - 1
    return names, [
        Column("method", lambda name: name),
        Column("held-out loss", lambda name: f"{losses[name].mean():.4f}"),
        Column("range", lambda name: f"{np.ptp(losses[name]):.4f}"),
        Column("to float32", lambda name: f"{100 * against(name).mean():+.2f}%"),
        Column("worst seed", lambda name: f"{100 * against(name).max():+.2f}%"),
        Column("state MB", lambda name: f"{bytes_of(name, 'state') / 1e6:.3f}"),
        Column("weights MB", lambda name: f"{bytes_of(name, 'weight') / 1e6:.3f}"),
    ]


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "low_bit_states.json")
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    if args.steps % CHUNK:
        parser.error(f"--steps must be a multiple of {CHUNK}, not {args.steps}")
    settings = Settings(batch_size=args.batch_size, sequence_length=args.sequence_length, devices=1)
    setting = {"model": settings.model, "batch_size": args.batch_size} | {
        "sequence_length": args.sequence_length,
        "eval_sequences": settings.eval_sequences,
        "steps": args.steps,
        "learning_rates": LEARNING_RATES,
    }
    results = Results(args.output, setting, args.log)
    trainer = functools.cache(functools.partial(trainer_of, settings=settings))
    for seed in range(args.seeds):
        for name in args.methods:
            peak = LEARNING_RATES[base(name)]
            run = lambda name=name, seed=seed, peak=peak: trainer(name).run(seed, peak, args.steps)
            results.once(("runs", name, f"seed {seed}"), run)
    title = (
        f"{settings.model}, {args.steps} steps of {args.batch_size} × {args.sequence_length} tokens"
    )
    print_columns(title, *columns(args.methods, results.content["runs"]), args.markdown)


if __name__ == "__main__":
    main()
