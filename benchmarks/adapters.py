"""The table of adapters: each on one model, at its best learning rate, with its bytes and time.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --markdown          # the table of what has been run
    python benchmarks/adapters.py --adapters lora lotr --model tests/config.json --steps 50

A model is made once, of the standard library's code without its documentation, and adapted to that
documentation. The learning rate of each adapter is chosen on seed 0, from three times and a third
of the example's on, further while the best is at an end; then the other seeds run with it. It is
chosen by the loss on every second held-out window, and the loss on the others is reported. Seeds
differ in the adapters' initial values and in the order of the text. Every run is written to the
results at once, so that a stopped benchmark goes on where it was, also where the model that is made
again differs by rounding; the table that the page "Which
adapter" shows is written beside them.
"""

import argparse
from collections.abc import Callable
import contextlib
import dataclasses
import functools
import io
from pathlib import Path
import statistics
import sys
import threading
import time
from typing import Any
import warnings

from family_table import Column, print_columns
import jax
import jax.numpy as jnp
from rich.console import Console
from training_runs import CHUNK, read_json, steps_of, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from _adapters import Parts, attach, parameter_count, put_together, take_apart
from _base_model import find_base
from _compaction import state_bytes
from _finetune_settings import FinetuneSettings
from _finished import logits_of
from _machine import make_mesh, peak_bytes
from _recipes import RECIPES, Adapted, Chosen, choose
from _start import Start, make_start
from finetune import loss_on, train_step
from pretrain import held_out_loss

import lowrank_optax as lro

ROOT = Path(__file__).resolve().parents[1]
MOST_RATES = 6
ROUNDS = 5
SAME_LOSS = 1e-2  # of a base that is made again, of which rounding is amplified by training


class Finetuning:
    """Trains one adapter: learning rates are data, so that all its runs are compiled once."""

    def __init__(self, chosen: Chosen, start: Start, text: Any, settings: FinetuneSettings) -> None:
        # The schedule then is the learning rate itself.
        self.chosen, self.start = chosen._replace(learning_rate=1.0), start
        self.rate = chosen.learning_rate
        self.text, self.settings = text, settings
        self.chunk: Callable | None = None
        self.peak: int | None = None
        self.last: tuple[Any, ...] | None = None  # what the last step was given

    def _compile(self, parts: Any, adapted: Adapted) -> None:
        def step(carry: Any, inputs: Any, rest: Any) -> tuple[Any, jax.Array]:
            tokens, rate = inputs
            tx = self.chosen.optimizer(lambda count: rate, adapted)
            *carry, loss = train_step(*carry, rest, tokens, graphdef=parts.training, tx=tx)
            return tuple(carry), loss

        self.chunk = jax.jit(
            lambda carry, rest, *inputs: jax.lax.scan(
                lambda carry, inputs: step(carry, inputs, rest), carry, inputs
            ),
            donate_argnums=0,
        )
        self.evaluate = jax.jit(functools.partial(loss_on, graphdef=parts.evaluation))

    def run(self, seed: int, rate: float) -> dict[str, Any]:
        """Trains from a seed at a learning rate; returns the figures of the run."""
        model = attach(self.start.model(), self.chosen, self.settings.where, seed)
        adapted = Adapted(model, self.settings.steps)
        parts = take_apart(model, self.chosen)
        if self.chunk is None:
            self._compile(parts, adapted)
        assert self.chunk is not None
        trained = jax.tree.map(jnp.copy, parts.trained)
        tx = self.chosen.optimizer(lambda count: 0.0, adapted)
        carry = trained, jax.jit(tx.init)(trained), parts.counts
        loop = dataclasses.replace(self.settings.loop(), seed=seed)
        for tokens, rates in steps_of(self.text, loop, rate, self.settings.steps):
            if self.peak is None:
                self.chunk = self.chunk.lower(carry, parts.rest, tokens, rates).compile()
                self.peak = peak_bytes(self.chunk)
            carry, _ = self.chunk(carry, parts.rest, tokens, rates)
        self.last = carry, parts.rest, tokens, rates
        loss = lambda windows: float(self.evaluate(windows, carry[0], carry[2], parts.rest))
        return {
            "choosing_loss": loss(self.start.windows[::2]),
            "held_out_loss": loss(self.start.windows[1::2]),
            "old_text_loss": loss(self.start.old_windows),
            "trained": parameter_count(carry[0]),
            "state_bytes": state_bytes(carry[1]),
            "peak_bytes": self.peak,
            "merge_error": merge_error(parts._replace(trained=carry[0], counts=carry[2]), self),
        }

    def seconds(self) -> float:
        """Time of a few steps more, after `run`; the trained values are given up."""
        assert self.chunk is not None
        assert self.last is not None
        carry, *inputs = self.last
        began = time.perf_counter()
        carry, _ = jax.block_until_ready(self.chunk(carry, *inputs))
        self.last = (carry, *inputs)
        return time.perf_counter() - began


def step_ratio(trainer: Finetuning, reference: Finetuning) -> float:
    """Median time of steps of the one over that of the other, which take turns."""
    pairs = [(trainer.seconds(), reference.seconds()) for _ in range(ROUNDS)]
    return statistics.median(x for x, _ in pairs) / statistics.median(y for _, y in pairs)


def merge_error(parts: Parts, trainer: Finetuning) -> float | None:
    """Largest difference of a logit after merging, over the largest; None if it cannot be."""
    method = trainer.chosen.method()
    if method is None or not method.has_delta:
        return None
    model, tokens = put_together(parts), trainer.start.windows[0, :, :-1]
    before = logits_of(model, tokens)
    lro.adapters.merge(model)
    return float(jnp.max(jnp.abs(logits_of(model, tokens) - before)) / jnp.max(jnp.abs(before)))


def learn(train: Callable[[int, float], float], peak: float, seeds: int) -> float:
    """Runs an adapter on all seeds at the learning rate that is best on the first."""
    losses = {rate: train(0, rate) for rate in (peak / 3, peak, 3 * peak)}
    while True:
        best = min(losses, key=losses.__getitem__)
        if len(losses) == MOST_RATES or min(losses) < best < max(losses):
            break
        further = best / 3 if best == min(losses) else best * 3
        losses[further] = train(0, further)
    for seed in range(1, seeds):
        train(seed, best)
    return best


def make_table(results: dict[str, Any], names: list[str], markdown: bool) -> None:
    """Prints a row for each adapter with all its seeds."""
    before, rows = results["before"], []
    for name in names:
        if name not in results["best"]:
            continue
        rate = results["best"][name]
        runs = [r for r in results["runs"].values() if (r["adapter"], r["rate"]) == (name, rate)]
        losses = [r["held_out_loss"] for r in runs]
        old = [r["old_text_loss"] - before["old_text_loss"] for r in runs]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        rows.append(runs[0] | {"loss": statistics.mean(losses), "spread": spread})
        rows[-1] |= {"old": statistics.mean(old), "step": results["steps"][name]}
    rows.sort(key=lambda row: row["loss"])
    columns = [
        Column("adapter", lambda r: r["adapter"]),
        Column("rank", lambda r: "" if r["rank"] is None else str(r["rank"])),
        Column("trained", lambda r: f"{r['trained']:,}"),
        Column("state, KiB", lambda r: f"{r['state_bytes'] / 2**10:,.1f}"),
        Column("peak, MiB", lambda r: f"{r['peak_bytes'] / 2**20:,.1f}"),
        Column("learning rate", lambda r: f"{r['rate']:.1e}"),
        Column("held-out loss", lambda r: f"{r['loss']:.4f} ± {r['spread']:.4f}"),
        Column("old text", lambda r: f"{r['old']:+.4f}"),
        Column("step over LoRA's", lambda r: f"{r['step']:.2f}"),
        Column(
            "merge error",
            lambda r: "" if r["merge_error"] is None else f"{r['merge_error']:.0e}",
        ),
    ]
    title = (
        f"{before['model']} after {before['steps']} steps; before: {before['held_out_loss']:.4f}, "
        f"old text {before['old_text_loss']:.4f}"
    )
    print_columns(title, rows, columns, markdown)


def main() -> None:
    """Runs what has not been run, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--model", default="llama-tiny")
    parser.add_argument("--base-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=150, help=f"a multiple of {CHUNK}")
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/adapters.json")
    parser.add_argument("--base", type=Path, default=ROOT / "runs/adapters", help="its folder")
    parser.add_argument("--markdown", action="store_true", help="run nothing")
    args = parser.parse_args()
    results = read_json(args.results) or {"before": {}, "runs": {}, "best": {}, "steps": {}}
    if not args.markdown:
        run_all(args, results)
        page = io.StringIO()
        with contextlib.redirect_stdout(page):
            make_table(results, list(results["best"]), markdown=True)
        args.results.with_suffix(".md").write_text(page.getvalue(), encoding="utf-8")
    make_table(results, args.adapters, args.markdown)


def base_of_results(stored: dict[str, Any], made: dict[str, Any], path: Path) -> dict[str, Any]:
    """What is known of the base of the stored runs: that which has been made, if there are none.

    Exits if that is another model. One that differs by rounding is warned of.
    """
    if stored in ({}, made):
        return made
    losses = ("held_out_loss", "old_text_loss")
    settings = [k for k in made if k not in (*losses, "weights") and made[k] != stored[k]]
    if settings or not all(abs(made[k] - stored[k]) <= SAME_LOSS for k in losses):
        changes = [f"{k} {stored[k]} there, {made[k]} here" for k in (*settings, *losses)]
        sys.exit(
            f"{path} is of another model or other settings ({'; '.join(changes)}): give --results"
        )
    of = lambda x: f"weights {x['weights'][:8]}, loss {x['held_out_loss']:.5f}"
    warnings.warn(
        f"the base model made here ({of(made)}) is not that of the runs in {path} ({of(stored)}): "
        "they differ by rounding, and new runs start from the one made here",
        stacklevel=2,
    )
    return stored


def run_all(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Adds the runs that are missing to the results, and to their file."""
    settings = FinetuneSettings(
        model=args.model,
        base_steps=args.base_steps,
        steps=args.steps,
        sequence_length=args.sequence_length,
        rank=args.rank,
        devices=1,
        eval_sequences=256,
    )
    base, mesh = find_base(settings), make_mesh(settings.loop())
    args.base.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True)
    start = make_start(base, settings, mesh, args.base, console, threading.Event())
    assert start is not None
    figures = {k: start.figures[k] for k in ("weights", "old_text_loss")}
    evaluate = jax.jit(functools.partial(held_out_loss, graphdef=start.graphdef))
    figures["held_out_loss"] = float(evaluate(start.params, start.windows[1::2]))
    figures |= {"model": args.model, "steps": args.steps, "rank": args.rank}
    results["before"] = base_of_results(results["before"], figures, args.results)
    trainers = {
        chosen.name: Finetuning(chosen, start, base.text, settings)
        for chosen in choose(
            dict.fromkeys(["lora", *args.adapters]), args.set, None, args.rank, None
        )
    }

    def train(trainer: Finetuning, seed: int, rate: float) -> float:
        name = trainer.chosen.name
        key = f"{name} seed {seed} rate {rate:.3g}"
        if key not in results["runs"]:
            run = {"adapter": name, "seed": seed, "rate": rate, "rank": trainer.chosen.rank}
            results["runs"][key] = run | trainer.run(seed, rate)
            write_json(args.results, results)
            console.print(f"{key}: {results['runs'][key]['held_out_loss']:.4f}")
        loss = results["runs"][key]["choosing_loss"]
        return loss if loss == loss else float("inf")  # NaN is the worst

    for name in args.adapters:
        trainer = trainers[name]
        rate = learn(functools.partial(train, trainer), trainer.rate, args.seeds)
        results["best"][name] = rate
        if name not in results["steps"]:
            for each in (trainer, trainers["lora"]):
                if each.last is None:
                    each.run(0, each.rate)
            results["steps"][name] = step_ratio(trainer, trainers["lora"])
        trainer.last = None if name != "lora" else trainer.last
        write_json(args.results, results)


if __name__ == "__main__":
    main()
