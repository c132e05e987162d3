"""Would a kernel that makes or reads codes inside a matrix product pay? Compiled for a v5e.

    python benchmarks/activation_kernels.py               # needs libtpu, no TPU
    python benchmarks/activation_kernels.py --markdown

A layer ``gelu(x @ kernel)`` that keeps 3-bit codes as numbers of 4 bits: the compiler's own fusion
against a matrix product that encodes as it ends, and against products that decode as they begin.
Then ``Sᵀ x`` with random signs ``S``: from memory, made inside the product, or rows instead of
signs. Bytes are those to and from main memory, a kernel's the tiles it reads and writes; *bound*
is the larger of the times for these bytes and for the multiplications at the chip's peaks. Each
kernel is first compared with `jax.numpy` at a small shape, interpreted.
"""

import argparse
from collections.abc import Callable
import functools
import json
import math
from pathlib import Path
import re
from typing import Any

from activation_products import (
    COLS,
    ROWS,
    SKETCH,
    WORD,
    backward_kernel,
    backward_xla,
    forward_kernel,
    forward_xla,
    layer_of,
    signs_of,
    sketch_kernel,
    sketch_rows,
    sketch_words,
    sketch_xla,
)
import jax
import jax.numpy as jnp
import numpy as np
from timing import print_table
from tpu_compiler import device_of, lowered_for

RESULTS = Path(__file__).parent / "results" / "activation_kernels.json"
BYTES_A_SECOND, FLOPS_A_SECOND = 820e9, 197e12  # of a v5e
LAYERS, TOKENS, INPUTS, HIDDEN = 8, 8192, 1024, 4096
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "u8": 1, "pred": 1, "u4": 0.5}
ARRAY = re.compile(r"\b(bf16|f32|s32|u32|u8|pred|u4)\[([\d,]+)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
COLUMNS = ["variant", "temporaries, MiB", "bytes moved, MiB", "bound, ms"]


def gradients_of(layer: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Of ``LAYERS`` layers ``x + layer(x, up) @ down`` in a scan, by ``up``; ``down`` is frozen."""

    def loss(up: jax.Array, down: jax.Array, x: jax.Array) -> jax.Array:
        step = lambda x, layer_: (x + layer(x, layer_[0]) @ layer_[1], None)
        y, _ = jax.lax.scan(step, x, (up, down))
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return jax.grad(loss)


def main_memory_bytes(program: str) -> float:
    """Bytes that the entry of a compiled program moves to and from main memory.

    The compiler's own account counts what lies in fast memory, ``S(1)``, as well. A kernel counts
    as what it said of itself.
    """
    size = lambda kind, shape: math.prod(map(int, shape.split(","))) * BYTES[kind]
    of_text = lambda text: sum(size(*a[:2]) for a in ARRAY.findall(text) if "S(" not in a[2])
    held: dict[str, float] = {}
    total = 0.0
    for line in program[program.index("\nENTRY") :].splitlines()[2:]:
        if not (found := INSTRUCTION.match(line)):
            continue
        name, result, operation, rest = found.groups()
        held[name] = of_text(result)
        if operation in ("parameter", "tuple", "get-tuple-element", "bitcast", "copy-done"):
            continue
        if estimate := re.search(r'"?bytes_accessed"?\s*[:=]\s*"?(\d+)', rest):
            total += int(estimate[1])
            continue
        operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
        written = 0 if operation == "copy-start" else held[name]
        total += written + sum(held.get(operand, 0) for operand in operands)
    return total


def measured(name: str, fn: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> list[Any]:
    """A row of the table; of scanned layers, the temporaries alone."""
    lowered = lowered_for(device_of("v5e"), fn, *arguments)
    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        print(f"{name}: {error}")
        return [name, "does not compile", "–", "–"]
    temporaries = round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1)
    if "layers" in name:
        return [name, temporaries, "–", "–"]
    moved, flops = main_memory_bytes(compiled.as_text()), compiled.cost_analysis()["flops"]
    bound = 1e3 * max(moved / BYTES_A_SECOND, flops / FLOPS_A_SECOND)
    return [name, temporaries, round(moved / 2**20, 1), round(bound, 3)]


def variants() -> list[tuple[str, Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]]:
    """All that is measured."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    x, kernel, seed = of(TOKENS, INPUTS), of(INPUTS, HIDDEN), jax.ShapeDtypeStruct((), jnp.int32)
    codes = jax.ShapeDtypeStruct((TOKENS, HIDDEN), jnp.uint4)
    backward = (x, kernel, codes, of(TOKENS, HIDDEN))
    scan = (of(LAYERS, INPUTS, HIDDEN), of(LAYERS, HIDDEN, INPUTS), x)
    rows = jax.ShapeDtypeStruct((SKETCH,), jnp.int32)
    gradients = lambda *parts: gradients_of(layer_of(*parts))
    return [
        ("forward: XLA", forward_xla, (x, kernel)),
        ("forward: kernel", forward_kernel, (x, kernel)),
        ("backward: XLA", backward_xla, backward),
        ("backward: kernels", backward_kernel, backward),
        ("8 layers: XLA", gradients(forward_xla, backward_xla), scan),
        ("8 layers: forward kernel", gradients(forward_kernel, backward_xla), scan),
        ("8 layers: backward kernels", gradients(forward_xla, backward_kernel), scan),
        ("8 layers: all kernels", gradients(forward_kernel, backward_kernel), scan),
        ("signs: XLA, a random number each", sketch_xla, (x, seed)),
        ("signs: XLA, a random bit each", sketch_words, (x, seed)),
        ("signs: kernel", sketch_kernel, (x, seed)),
        ("rows: XLA", sketch_rows, (x, rows)),
    ]


def check_kernels() -> None:
    """Compares each kernel, interpreted, with `jax.numpy`; raises where they differ."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2 * ROWS, 128), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (128, 2 * COLS), jnp.bfloat16) / 8
    g = jax.random.normal(keys[2], (2 * ROWS, 2 * COLS), jnp.bfloat16)
    words = jax.random.bits(keys[3], (2 * ROWS // WORD, 128), jnp.uint32)
    y, codes = forward_xla(x, kernel)
    found = forward_kernel(x, kernel, interpret=True)
    compare = functools.partial(np.testing.assert_allclose, rtol=0.02, atol=0.02)
    wide = lambda a: np.asarray(a.astype(jnp.float32))
    compare(wide(found[0]), wide(y))
    # A sum in another order may round to the other side of a boundary.
    assert np.mean(wide(found[1]) != wide(codes)) < 1e-3
    pairs = [
        *zip(
            backward_kernel(x, kernel, codes, g, interpret=True),
            backward_xla(x, kernel, codes, g),
            strict=True,
        )
    ]
    tiles = [signs_of(tile, x.dtype) for tile in jnp.split(words, 2)]
    expected = jnp.concatenate(tiles).astype(jnp.float32).T @ x.astype(jnp.float32)
    pairs.append((sketch_kernel(x, jnp.int32(0), words, interpret=True), expected))
    for mine, reference in pairs:
        scale = np.max(np.abs(wide(reference)))
        compare(wide(mine) / scale, wide(reference) / scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--markdown", action="store_true", help="print the table for the docs")
    args = parser.parse_args()
    check_kernels()
    done = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    for name, fn, arguments in variants():
        if name not in [row[0] for row in done]:
            done.append(measured(name, fn, *arguments))
            note = {"chip": "v5e", "jax": jax.__version__, "columns": COLUMNS, "rows": done}
            args.output.write_text(json.dumps(note, indent=1) + "\n")
            print(done[-1], flush=True)
    if args.markdown:
        lines = [COLUMNS, ["---"] * len(COLUMNS), *done]
        print("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))
    else:
        print_table("Compiled for a v5e", COLUMNS, done)


if __name__ == "__main__":
    main()
