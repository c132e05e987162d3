"""Time and temporary memory of a training step of adapters, against Flax and against PEFT.

    python benchmarks/adapter_step.py
    python benchmarks/adapter_step.py --markdown          # the table of what has been measured
    python benchmarks/adapter_step.py --layers 2 --width 64 --tokens 128 --rounds 3

A step is forward, backward and AdamW of a stack of MLPs (two linear layers, ReLU, a residual) whose
linear layers are all adapted, in float32. Four kinds take turns in one run: this library's adapters
attached to an NNX model, ``flax.nnx.LoRALinear`` in the same model, Hugging Face PEFT on PyTorch,
eager, where it is installed, and training all weights. Temporary memory is what XLA says a compiled
step needs of the same stack when its layers are scanned.
"""

import argparse
from collections.abc import Callable
import json
import os
from pathlib import Path
import sys
import time
from typing import Any, NamedTuple

from family_table import Column, print_columns
from flax import nnx
import jax
import jax.numpy as jnp
import optax
from timing import Stepper, milliseconds

import lowrank_optax as lro

RESULTS = Path(__file__).parent / "results" / "adapter_step.json"
OURS = {
    "LoRA": lro.adapters.LoRA,
    "LoRA-FA": lro.adapters.LoRAFA,
    "DoRA": lro.adapters.DoRA,
    "LoTR": lro.adapters.LoTR,
    "FlyLoRA": lro.adapters.FlyLoRA,
}
# After a step of PyTorch its threads go on spinning for a while, on the cores of who is next.
SETTLE = 0.05
BASELINE, FLAX, PEFT, FULL = "LoRA", "flax.nnx.LoRALinear", "peft, PyTorch", "all weights"


class Block(nnx.Module):
    """``x + relu(x U) D``, with linear layers that ``linear`` makes."""

    def __init__(self, width: int, linear: Callable[..., nnx.Module], rngs: nnx.Rngs) -> None:
        self.up = linear(width, 4 * width, rngs=rngs)
        self.down = linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """One layer."""
        return x + self.down(jax.nn.relu(self.up(x)))


class Stack(nnx.Module):
    """Blocks, one after the other or scanned."""

    def __init__(
        self, args: argparse.Namespace, linear: Callable[..., nnx.Module], *, scan: bool = False
    ) -> None:
        rngs, self.scan = nnx.Rngs(0), scan
        one = lambda rngs: Block(args.width, linear, rngs)
        if scan:
            self.blocks = nnx.vmap(one)(rngs.split(args.layers))
        else:
            self.blocks = nnx.List([one(rngs) for _ in range(args.layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """All layers."""
        if self.scan:
            step = nnx.scan(lambda x, b: b(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return step(x, self.blocks)
        for block in self.blocks:
            x = block(x)
        return x


def plain_linear(d_in: int, d_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer without bias."""
    return nnx.Linear(d_in, d_out, use_bias=False, rngs=rngs)


def model_of(kind: str, args: argparse.Namespace, *, scan: bool = False) -> tuple[Stack, Any]:
    """The model of a row, and the filter of what it trains."""
    if kind == FLAX:
        lora = lambda d_in, d_out, rngs: nnx.LoRALinear(
            d_in, d_out, lora_rank=args.rank, use_bias=False, rngs=rngs
        )
        return Stack(args, lora, scan=scan), nnx.LoRAParam
    model = Stack(args, plain_linear, scan=scan)
    if kind == FULL:
        return model, nnx.Param
    # FlyLoRA has as many active ranks, of four times as many.
    options = {"active": args.rank} if kind == "FlyLoRA" else {}
    rank = 4 * args.rank if options else args.rank
    method = OURS[kind](rank=rank, alpha=2 * rank, **options)
    lro.adapters.attach(model, method, ".*", rngs=0)
    return model, lro.adapters.trainable


class TrainingStep(NamedTuple):
    """A step ``(trained, state), rest, x -> (trained, state)`` of an NNX model's arrays."""

    step: Callable[..., Any]
    tx: optax.GradientTransformation
    trained: Any
    rest: Any

    def stepper(self, args: argparse.Namespace) -> Stepper:
        """The step compiled, with its carry."""
        x = jax.random.normal(jax.random.key(1), (args.tokens, args.width))
        return Stepper(self.step, (self.trained, self.tx.init(self.trained)), self.rest, x)


def training_step(kind: str, model: Stack, wrt: Any) -> TrainingStep:
    """The training step of a row."""
    graph, trained, rest = nnx.split(model, wrt, ...)
    tx = optax.adamw(1e-4)
    tx = lro.adapters.flylora_balance(tx) if kind == "FlyLoRA" else tx

    def step(carry: Any, rest: Any, x: jax.Array) -> Any:
        trained, state = carry
        loss = lambda t: jnp.mean(jnp.square(nnx.merge(graph, t, rest)(x)))
        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    return TrainingStep(step, tx, nnx.as_pure(trained), nnx.as_pure(rest))


def peft_stepper(args: argparse.Namespace) -> tuple[Callable[[], float], int] | None:
    """The same of PEFT, and how many numbers it trains; None where it is not installed."""
    try:
        import peft
        import torch
    except ImportError:
        return None
    # As many threads as XLA has.
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    class TorchBlock(torch.nn.Module):
        """The same block."""

        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(args.width, 4 * args.width, bias=False)
            self.down = torch.nn.Linear(4 * args.width, args.width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """One layer."""
            return x + self.down(torch.relu(self.up(x)))

    stack = torch.nn.Sequential(*[TorchBlock() for _ in range(args.layers)])
    config = peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=["up", "down"])
    model = peft.get_peft_model(stack, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4)
    x = torch.randn(args.tokens, args.width)

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        seconds = time.perf_counter() - began
        time.sleep(SETTLE)
        return seconds

    return step, sum(p.numel() for p in trained)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind."""
    steps = {k: training_step(k, *model_of(k, args)) for k in (FULL, *OURS, FLAX)}
    steppers: dict[str, Any] = {k: s.stepper(args) for k, s in steps.items()}
    counts = {k: sum(x.size for x in jax.tree.leaves(s.trained)) for k, s in steps.items()}
    scanned = {k: training_step(k, *model_of(k, args, scan=True)).stepper(args) for k in steps}
    temporary = {k: s.compiled.memory_analysis().temp_size_in_bytes for k, s in scanned.items()}
    if other := peft_stepper(args):
        steppers[PEFT], counts[PEFT] = other
    times = milliseconds(steppers, args.rounds)
    return [
        {
            "kind": kind,
            "trained": counts[kind],
            "milliseconds": times[kind],
            "over_lora": times[kind] / times[BASELINE],
            "temporary_bytes": temporary.get(kind),
        }
        for kind in steppers
    ]


def print_results(results: dict[str, Any], markdown: bool) -> None:
    """Prints the table of what has been measured."""
    mebibytes = lambda n: "" if n is None else f"{n / 2**20:.3g}"
    columns = [
        Column("", lambda row: row["kind"]),
        Column("trained", lambda row: f"{row['trained']:,}"),
        Column("ms", lambda row: f"{row['milliseconds']:.3g}"),
        Column("over LoRA", lambda row: f"{row['over_lora']:.2f}"),
        Column("temporaries, scanned, MiB", lambda row: mebibytes(row["temporary_bytes"])),
    ]
    title = "{layers} MLPs of width {width}, {tokens} tokens, rank {rank}, float32, {device}"
    print_columns(title.format(**results), results["rows"], columns, markdown)


def main() -> None:
    """Measures and writes the numbers, unless Markdown is asked for, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--markdown", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.markdown:
        shape = {k: getattr(args, k) for k in ("layers", "width", "tokens", "rank", "rounds")}
        measured = {**shape, "device": jax.devices()[0].device_kind, "rows": measure(args)}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(measured, indent=1) + "\n")
    if not args.output.exists():
        sys.exit(f"{args.output} is not there yet: run this without --markdown first")
    print_results(json.loads(args.output.read_text()), args.markdown)


if __name__ == "__main__":
    main()
