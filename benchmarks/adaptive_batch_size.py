"""Adaptive against constant batch sizes: the main job, on the same number of tokens.

    python benchmarks/adaptive_batch_size.py             # whatever is missing in the results file
    python benchmarks/adaptive_batch_size.py --markdown  # the table as Markdown

Runs the main job itself with AdamW at one constant learning rate, from each seed with the smallest
batch, the largest, and one that grows from the first to the second: what a falling learning rate
does for a small batch, less noise towards the end, growing does without one. A stopped run goes on
where it was.
"""

import argparse
from pathlib import Path
import shutil
import sys
from typing import Any

from family_table import Column, print_columns
import numpy as np
from projection_family import RESULTS, Results
from training_runs import read_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import pretrain


def batch_flags(args: argparse.Namespace) -> dict[str, list[str]]:
    """What differs from run to run, by a name for the table."""
    small, large, sequences = args.smallest, args.largest, args.sequences
    bounds = ["--initial-batch-size", str(small), "--max-batch-size", str(large)]
    fixed = lambda size: ["--batch-size", str(size), "--steps", str(sequences // size)]
    growing = ["--batch-size", "adaptive", "--eta", str(args.eta), *bounds]
    return {
        f"{small}": fixed(small),
        f"{small} to {large}": [*growing, "--steps", str(sequences // small)],
        f"{large}": fixed(large),
    }


def run(name: str, flags: list[str], seed: int, folder: Path, args: argparse.Namespace) -> dict:
    """The figures of one run, whose folder is kept until it is done.

    Raises:
      SystemExit: If it was stopped.
    """
    folder = folder / f"{name.replace(' ', '_')}-{seed}"
    resume = ["--resume"] if (folder / "run.json").exists() else []
    common = ["--optimizer", "adamw", "--sequence-length", str(args.sequence_length)]
    common += ["--learning-rate", str(args.learning_rate), "--seed", str(seed), "--devices", "1"]
    common += ["--schedule", args.schedule]
    given = [] if resume else [*common, *flags, "--eval-every", "1000000"]
    if status := pretrain.main([*given, "--output", str(folder), *resume]):
        raise SystemExit(status)
    result = read_json(folder / "results.json")["adamw"]
    steps = result["steps"] or int(flags[flags.index("--steps") + 1])
    figures = {"held_out_loss": result["held_out_loss"], "steps": steps}
    figures["noise_scale"] = result["noise_scale"]
    shutil.rmtree(folder)
    return figures


def columns(runs: dict[str, Any]) -> tuple[list[str], list[Column]]:
    """Rows and columns of the table; losses beside those of the smallest batch."""
    names = list(runs)
    figures = lambda name, key: np.array([seed[key] for seed in runs[name].values()])
    loss = lambda name: figures(name, "held_out_loss")
    count = lambda name: min(len(runs[name]), len(runs[names[0]]))
    against = lambda name: loss(name)[: count(name)] / loss(names[0])[: count(name)] - 1
    return names, [
        Column("batch", str),
        Column("held-out loss", lambda name: f"{loss(name).mean():.4f}"),
        Column("range", lambda name: f"{np.ptp(loss(name)):.4f}"),
        Column("to the smallest", lambda name: f"{100 * against(name).mean():+.2f}%"),
        Column("steps", lambda name: f"{figures(name, 'steps').mean():.0f}"),
    ]


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=4096, help="read by every run")
    parser.add_argument("--smallest", type=int, default=4)
    parser.add_argument("--largest", type=int, default=64)
    parser.add_argument("--eta", type=float, default=0.9)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--schedule", default="constant", help="as of the main job")
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "adaptive_batch_size.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/adaptive_batch_size"))
    parser.add_argument("--log", type=Path, help="a file to which each result is appended")
    args = parser.parse_args()
    if args.sequences % args.largest or args.largest % args.smallest:
        parser.error("--sequences must be a multiple of --largest, and that of --smallest")
    names = ("sequences", "smallest", "largest", "eta", "learning_rate", "schedule")
    names += ("sequence_length",)
    results = Results(args.output, {name: getattr(args, name) for name in names}, args.log)
    for seed in range(args.seeds):
        for name, flags in batch_flags(args).items():
            measure = lambda name=name, flags=flags, seed=seed: run(
                name, flags, seed, args.runs, args
            )
            results.once(("runs", name, f"seed {seed}"), measure)
    title = f"AdamW, {args.sequences} sequences of {args.sequence_length} tokens"
    print_columns(title, *columns(results.content["runs"]), args.markdown)


if __name__ == "__main__":
    main()
