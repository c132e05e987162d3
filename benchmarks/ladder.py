"""Where memory goes: what one training step takes on a TPU, rung by rung.

    python benchmarks/ladder.py                          # whatever is missing in the results file
    python benchmarks/ladder.py --only llama-1b --chips v5e
    python benchmarks/ladder.py --markdown               # the table as Markdown

Each rung changes one thing of the rung before it, in the order in which to try them. Every cell is
the whole step of one device, compiled for the chip on a machine without one (`libtpu`, the extra
`tpu-check`): the memory that the compiler assigns to it, which is what it compares with the chip's.
Where that is more than the chip has, the cell has in brackets what the step takes on a v5p, which
has 95 GiB.
"""

import argparse
from collections.abc import Callable
import json
import os
from pathlib import Path
import re
import sys
import time
from typing import Any, Literal, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from flax import nnx
import jax
import jax.numpy as jnp
import optax
from tpu_compiler import allocated_bytes, device_of, lowered_for

import lowrank_optax as lro
from lowrank_optax.models import Decoder, decoder_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from pretrain import LOSSES

RESULTS = Path(__file__).parent / "results" / "ladder.json"
# With the rank of a projection. The MLP of llama-1b is as wide as a TPU's tiles: its own 5461 are
# no multiple of 128, and the compiler then copies stacks of weights into another order.
MODELS = {"llama-1b": 256, "llama-7b": 1024}
WIDTHS = {"llama-1b": {"intermediate_size": 5504}, "llama-7b": {}}
CHIPS = {"v5e": 15.75, "v6e": 31.25}  # with the GiB that a program may take
LARGEST, LARGEST_GIB = "v5p", 95.0
GIB = 2**30


class Rung(NamedTuple):
    """How a model is trained."""

    optimizer: Callable[[nnx.Module, int], optax.GradientTransformation]
    loss: str = "plain"
    attention: str = "xla"
    remat: str | None = None
    remat_every: int = 1
    in_backward: bool = False
    each: Literal["slice"] | None = None
    param_dtype: Any = jnp.float32
    adapter: Any = None


def adamw(model: nnx.Module, rank: int) -> optax.GradientTransformation:
    """AdamW, its moments in float32."""
    return optax.adamw(1e-4)


def rounded(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Steps computed in float32 for weights that are rounded at random."""
    return optax.chain(lro.in_float32(tx), lro.round_updates("stochastic"))


def galore(model: nnx.Module, rank: int) -> optax.GradientTransformation:
    """GaLore with moments in 8 bits and bases in bfloat16."""
    dimensions = lro.weight_dimension_numbers(model)
    options = {"state_bits": 8, "basis_bits": 16, "weight_dimension_numbers": dimensions}
    return rounded(lro.galore(1e-4, rank=rank, **options))


PLAIN = Rung(adamw)
CHUNKED_LOSS = PLAIN._replace(loss="chunked")
CHUNKED_ATTENTION = CHUNKED_LOSS._replace(attention="chunked")
REMAT = CHUNKED_ATTENTION._replace(remat="full")
IN_BACKWARD = REMAT._replace(in_backward=True)
BFLOAT16 = IN_BACKWARD._replace(
    param_dtype=jnp.bfloat16, optimizer=lambda *_: rounded(optax.adamw(1e-4))
)
LORA = REMAT._replace(param_dtype=jnp.bfloat16, adapter=lro.adapters.LoRA(rank=16, alpha=16))
EIGHT_BITS = BFLOAT16._replace(optimizer=lambda *_: rounded(lro.low_bit(optax.adamw(1e-4))))
LADDER = {
    "AdamW in float32": PLAIN,
    "loss without logits": CHUNKED_LOSS,
    "attention without its matrix": CHUNKED_ATTENTION,
    "blocks recomputed": REMAT,
    "update inside backward": IN_BACKWARD,
    "weights in bfloat16": BFLOAT16,
    "moments in 8 bits": EIGHT_BITS,
    "second moment factored": BFLOAT16._replace(
        optimizer=lambda *_: rounded(optax.adafactor(1e-4)), each="slice"
    ),
    "projected moments": BFLOAT16._replace(optimizer=galore),
    "LoRA, rank 16": LORA,
    "LoRA, input of every second block": LORA._replace(remat_every=2),
}


def make_model(name: str, rung: Rung) -> Decoder:
    """The decoder as a rung has it, in shapes alone."""

    def make() -> Decoder:
        model = Decoder(
            decoder_config(name, **WIDTHS[name]),
            rngs=nnx.Rngs(0),
            dtype=jnp.bfloat16,
            param_dtype=rung.param_dtype,
            remat=rung.remat,
            remat_every=rung.remat_every,
            attention_implementation=rung.attention,
        )
        if rung.adapter is None:
            return model
        return lro.adapters.attach(model, rung.adapter, rngs=nnx.Rngs(0))

    return nnx.eval_shape(make)


def step_of(rung: Rung, model: Decoder, rank: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step, and the shapes of what it takes before the tokens; the first two are donated."""
    tx = rung.optimizer(model, rank)
    loss_fn = LOSSES[rung.loss]
    wrt = nnx.Param if rung.adapter is None else lro.adapters.trainable
    graphdef, *parts = nnx.split(model, wrt, ...)
    params, rest = map(nnx.as_pure, parts)
    if rung.in_backward:
        update = lro.update_in_backward(model, tx, loss=loss_fn, each=rung.each, wrt=wrt)

        def step_in_backward(params: Any, state: Any, rest: Any, tokens: jax.Array) -> Any:
            batch = tokens[:, :-1], tokens[:, 1:]
            return update.step(params, state, batch, None, rest)[:3]

        return step_in_backward, (params, jax.eval_shape(update.init, params), rest)

    def loss(params: Any, rest: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params, rest)
        return loss_fn(model, model.hidden(tokens[:, :-1]), tokens[:, 1:])

    def step(params: Any, state: Any, rest: Any, tokens: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, rest, tokens)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step, (params, jax.eval_shape(tx.init, params), rest)


def lowered_step(name: str, title: str, chip: str, shape: tuple[int, int]) -> jax.stages.Lowered:
    """The step of a cell, for tokens [batch, length]."""
    model = make_model(name, LADDER[title])
    step, arguments = step_of(LADDER[title], model, MODELS[name])
    tokens = jax.ShapeDtypeStruct((shape[0], shape[1] + 1), jnp.int32)
    return lowered_for(device_of(chip), step, *arguments, tokens, donate_argnums=(0, 1))


def needed(name: str, title: str, chip: str, shape: tuple[int, int]) -> float | None:
    """GiB of the compiled step; None if the chip is too small."""
    size = allocated_bytes(lowered_step, name, title, chip, shape)
    limit = LARGEST_GIB if chip == LARGEST else CHIPS[chip]
    return None if size is None or size > limit * GIB else size / GIB


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree of shapes."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def measure(name: str, title: str, chips: list[str], shape: tuple[int, int]) -> dict[str, Any]:
    """Bytes of weights and state, and what the step needs on each chip."""
    _, (params, state, rest) = step_of(LADDER[title], make_model(name, LADDER[title]), MODELS[name])
    figures: dict[str, Any] = {"weight_bytes": nbytes((params, rest)), "state_bytes": nbytes(state)}
    size = needed(name, title, LARGEST, shape)
    for chip in chips:
        hopeless = size is None or size > 1.2 * CHIPS[chip]
        figures[chip] = None if hopeless else needed(name, title, chip, shape)
    return figures | {LARGEST: size}


def cell(figures: dict[str, Any], chip: str) -> str:
    """GiB of a step on a chip; in brackets those on a v5p where the chip is too small."""
    if chip not in figures:
        return ""
    if figures[chip] is not None:
        return f"**{figures[chip]:.2f}**"
    return "-" if figures[LARGEST] is None else f"({figures[LARGEST]:.2f})"


def print_markdown(results: dict[str, Any]) -> None:
    """The table: a row a rung, for each model its state and what it takes on each chip."""
    found = {(key.split(":")[0], chip) for key, row in results.items() for chip in row}
    columns = [(name, chip) for name in MODELS for chip in CHIPS if (name, chip) in found]
    print("| | " + " | ".join(f"`{name}`, {chip}" for name, chip in columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for title in LADDER:
        row = [cell(results.get(f"{name}: {title}", {}), chip) for name, chip in columns]
        print(f"| {title} | " + " | ".join(row) + " |")


def main() -> None:
    """Compiles what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cells that this regular expression finds")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    if not args.markdown:
        for name in MODELS:
            for title in LADDER:
                key = f"{name}: {title}"
                chips = [chip for chip in args.chips if chip not in results.get(key, {})]
                if not chips or not re.search(args.only, key):
                    continue
                began = time.perf_counter()
                figures = measure(name, title, chips, (args.batch, args.length))
                results[key] = results.get(key, {}) | figures
                print(f"{key}: {figures} ({time.perf_counter() - began:.0f} s)", flush=True)
                args.results.write_text(json.dumps(results, indent=1) + "\n")
    print_markdown(results)


if __name__ == "__main__":
    main()
