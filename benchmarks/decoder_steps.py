"""A training step of the decoder's variants against the dense decoder's: time and compiled peak.

    python benchmarks/decoder_steps.py
    python benchmarks/decoder_steps.py --width 1024 --rounds 5

All steps are the main job's by AdamW, in float32, and take turns in one run. A peak is the
compiler's count of arguments and temporaries on this backend.
"""

import argparse
import dataclasses
from pathlib import Path
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax
from timing import Program, milliseconds, print_table

import lowrank_optax as lro
from lowrank_optax.adapters.base import parameter_count
from lowrank_optax.models import Decoder, decoder_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from _machine import peak_bytes
from _ranks import without_ranks
from pretrain import train_step

WORDS = 257
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "LowRank": {"feed_forward": "lowrank"},
    "BlockDense": {"feed_forward": "blockdense"},
    "BlockShuffle": {"feed_forward": "blockshuffle"},
    "BlockShuffle, guided": {"feed_forward": "blockshuffle", "guide": True},
    "Maestro, full rank": {"linear": "maestro"},
    "fixed point, 8 bits": {"bits": 8},
}


def make_step(options: dict[str, Any], config: Any, tokens: jax.Array) -> tuple[Program, int]:
    """A variant's compiled step, and its number of parameters."""
    options, tx = dict(options), optax.with_extra_args_support(optax.adamw(1e-3))
    bits, has_guide = options.pop("bits", None), options.get("guide", False)
    model = Decoder(config, rngs=nnx.Rngs(0), **options)
    if bits is not None:
        lro.layers.convert_to_fixed_point(model, bits)
        lro.layers.calibrate_fixed_point(model, Decoder.hidden, tokens[0, :, :-1], rule="max")
    has_ranks = options.get("linear") is not None
    graphdef, params = nnx.split(without_ranks(model) if has_ranks else model)

    def step(carry: Any, tokens: jax.Array, key: jax.Array) -> Any:
        # Half of the guided calls are skipped.
        aids = (key, jnp.asarray(0.5)) if has_guide else (key if has_ranks else None, None)
        threshold = 1e-5 if has_ranks else None
        return train_step(
            *carry, tokens, *aids, graphdef=graphdef, tx=tx, rank_threshold=threshold
        )[:2]

    params = nnx.as_pure(params)
    carry = params, tx.init(params)
    inputs = tokens, jax.random.key(0)
    compiled = jax.jit(step, donate_argnums=0).lower(carry, *inputs).compile()
    return Program(compiled, carry, *inputs), parameter_count(params)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    config = dataclasses.replace(
        decoder_config("llama-60m", vocab_size=WORDS),
        hidden_size=args.width,
        intermediate_size=8 * args.width // 3 // 16 * 16,
        num_hidden_layers=args.blocks,
    )
    shape = 1, args.batch_size, args.sequence_length + 1
    tokens = jax.random.randint(jax.random.key(1), shape, 0, WORDS)
    made = {name: make_step(options, config, tokens) for name, options in VARIANTS.items()}
    times = milliseconds({name: program for name, (program, _) in made.items()}, args.rounds)
    peaks = {name: peak_bytes(program.compiled) or 0 for name, (program, _) in made.items()}
    rows = [
        [
            name,
            f"{count:,}",
            times[name],
            times[name] / times["dense"],
            peaks[name] / 2**20,
            peaks[name] / peaks["dense"],
        ]
        for name, (_, count) in made.items()
    ]
    title = (
        f"width {args.width}, {args.blocks} blocks, {args.batch_size} × {args.sequence_length} "
        f"tokens, {jax.default_backend()}"
    )
    heads = ["decoder", "parameters", "ms", "/ dense", "peak, MiB", "/ dense"]
    print_table(title, heads, rows)


if __name__ == "__main__":
    main()
