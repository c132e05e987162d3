"""Implementations of attention: what a TPU's compiler allocates, and times on this machine.

    python benchmarks/attention.py              # both, and writes results/attention.json
    python benchmarks/attention.py --only time  # or memory
    python benchmarks/attention.py --markdown   # prints the tables of results/attention.json

Memory: one block of `llama-1b` in bfloat16, its output and all gradients, compiled for a v5e
without one, beside arguments and results; the largest array is one of the compiled program with the
sequence as one of its axes. Rows that are in the results are left as they are. Times: output and
gradients of causal attention, both implementations in turn in one run, lower quartiles.
"""

import argparse
from collections.abc import Callable
import functools
import json
import math
from pathlib import Path
import re
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from timing import print_table
from tpu_compiler import allocated_bytes, device_of, lowered_for

from lowrank_optax.layers import dot_product_attention
from lowrank_optax.models import decoder_config
from lowrank_optax.models.decoder_block import Block
from lowrank_optax.models.rotary import inverse_frequencies, rotary_angles

RESULTS = Path(__file__).parent / "results" / "attention.json"
BITS = {"pred": 8, "s32": 32, "u32": 32, "bf16": 16, "f32": 32}
# Batch and length of each block, and which implementations are compiled for it.
BLOCKS = {
    (2, 2048): ("xla", "chunked", "splash"),
    (1, 8192): ("chunked", "splash", "xla"),
    (1, 16384): ("chunked",),
}
# Batch, length, heads of queries and of keys, width, dtype.
CALLS = [
    (8, 256, 8, 8, 64, "float32"),
    (4, 512, 8, 8, 64, "float32"),
    (2, 1024, 8, 2, 64, "float32"),
    (1, 2048, 8, 8, 64, "float32"),
    (1, 2048, 8, 8, 64, "bfloat16"),
]


def with_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Outputs of a function, and its gradients for a cotangent."""

    def run(cotangent: Any, *args: Any) -> Any:
        outputs, backward = jax.vjp(fn, *args)
        return outputs, backward(cotangent)

    return run


def largest_array(text: str, length: int) -> tuple[int, str]:
    """Bytes and type of the largest array of a compiled program, but for weights."""
    found = {}
    for dtype, axes in re.findall(r"\b([a-z]+\d*)\[([\d,]+)\]", text):
        sizes = [int(n) for n in axes.split(",")]
        if dtype in BITS and len(sizes) > 2 and length in sizes:
            found[f"{dtype}[{axes}]"] = math.prod(sizes) * BITS[dtype] // 8
    name = max(found, key=lambda name: found[name])
    return found[name], name


def block_program(batch: int, length: int, implementation: str) -> tuple[Callable[..., Any], Any]:
    """Output and gradients of one block, and the shapes of the arguments."""
    config = decoder_config("llama-1b")
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    options = {"attention_implementation": implementation, **types}
    make = lambda: nnx.split(Block(config, rngs=nnx.Rngs(0), **options))
    graphdef, params = nnx.eval_shape(make)

    def run(params: Any, x: jax.Array) -> jax.Array:
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, None)
        rotary = rotary_angles(jnp.arange(length), frequencies)
        return nnx.merge(graphdef, params)(x, rotary, None, 0)[0]

    x = jax.ShapeDtypeStruct((batch, length, config.hidden_size), jnp.bfloat16)
    return with_gradients(run), (x, nnx.as_pure(params), x)


def lowered_block(batch: int, length: int, implementation: str) -> jax.stages.Lowered:
    """The program of one block for a v5e."""
    jax.default_backend = lambda: "tpu"  # what is traced below is compiled for one
    step, arguments = block_program(batch, length, implementation)
    return lowered_for(device_of("v5e"), step, *arguments)


def compiled_block(batch: int, length: int, implementation: str) -> dict[str, Any]:
    """Temporaries and largest array of one block."""
    try:
        program = lowered_block(batch, length, implementation).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"refused": str(error)}
    largest, name = largest_array(program.as_text(), length)
    size = allocated_bytes(lowered_block, batch, length, implementation)
    assert size is not None
    step, arguments = block_program(batch, length, implementation)
    given = jax.tree.leaves((arguments, jax.eval_shape(step, *arguments)))
    temporaries = size - sum(x.size * x.dtype.itemsize for x in given)
    return {"temporary_bytes": temporaries, "largest_bytes": largest, "largest": name}


def timed(shape: tuple[Any, ...], rounds: int) -> dict[str, float]:
    """Lower quartiles of milliseconds of each implementation, run in turn."""
    batch, length, heads, key_heads, width, dtype = shape
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, heads: jax.random.normal(key, (batch, length, heads, width), dtype)
    given = [draw(k, n) for k, n in zip(keys, (heads, heads, key_heads, key_heads), strict=True)]
    programs = {}
    for name in ("xla", "chunked"):
        fn = functools.partial(dot_product_attention, is_causal=True, implementation=name)
        programs[name] = jax.jit(with_gradients(fn))
        jax.block_until_ready(programs[name](*given))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*given))
            seconds[name].append(time.perf_counter() - began)
    return {name: 1e3 * float(np.quantile(x, 0.25)) for name, x in seconds.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Fills in what is asked for."""
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    if "time" in args.only:
        rows = results["time"] = {"rounds": args.rounds, "rows": []}
        for shape in CALLS:
            rows["rows"].append({"shape": shape, "milliseconds": timed(shape, args.rounds)})
    if "memory" in args.only:
        rows = results.setdefault("memory", [])
        cases = [(*tokens, name) for tokens, names in BLOCKS.items() for name in names]
        for case in cases:
            named = dict(zip(("batch", "length", "implementation"), case, strict=True))
            if any(row.items() >= named.items() for row in rows):
                continue
            began = time.perf_counter()
            rows.append({**named, **compiled_block(*case)})
            print(f"{time.perf_counter() - began:.0f} s: {rows[-1]}", flush=True)
            write(args.output, results)
    write(args.output, results)
    return results


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes the results file."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def show(results: dict[str, Any], markdown: bool) -> None:
    """Prints both tables."""
    mebibytes = lambda row, key: f"{row[key] / 2**20:,.0f}" if key in row else "does not fit 16 GiB"
    memory = [
        [
            f"{row['batch']} × {row['length']:,}",
            f"`{row['implementation']}`",
            mebibytes(row, "temporary_bytes"),
            f"{row['largest']}" if "largest" in row else "",
        ]
        for row in results.get("memory", [])
    ]
    times = [
        [
            f"{b} × {t:,}, {n} / {k} heads, {dtype}",
            f"{row['milliseconds']['xla']:.0f}",
            f"{row['milliseconds']['chunked']:.0f}",
            f"{row['milliseconds']['chunked'] / row['milliseconds']['xla']:.2f}",
        ]
        for row in results.get("time", {"rows": []})["rows"]
        for b, t, n, k, _, dtype in [row["shape"]]
    ]
    tables = {
        "block": (["tokens", "implementation", "temporaries, MiB", "largest array"], memory),
        "causal, forward and backward": (["", "`xla`, ms", "`chunked`, ms", "ratio"], times),
    }
    for title, (columns, lines) in tables.items():
        if not markdown:
            print_table(title, columns, lines)
            continue
        print(f"\n| {' | '.join(columns)} |\n|---|{'--:|' * (len(columns) - 1)}")
        for line in lines:
            print(f"| {' | '.join(line)} |")


def main() -> None:
    """Measures, writes the numbers and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["time", "memory"], help="time, memory")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", action="store_true", help="print, and measure nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.markdown else measure(args)
    show(results, args.markdown)


if __name__ == "__main__":
    main()
