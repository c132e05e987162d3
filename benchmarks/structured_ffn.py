"""Structured weights against dense ones: times on this machine, bytes of a TPU's program.

    python benchmarks/structured_ffn.py              # times, all weights in turn in one run
    python benchmarks/structured_ffn.py --only bytes # compiles for a v5e, with libtpu

A weight of 1024 × 4096 and 2048 tokens: the product, and the product with all gradients. A quarter
of the parameters is a quarter of the operations. Bytes are those that the compiled program moves
from and to the chip's main memory, over those that it must: inputs, factors and outputs. What stays
in the memory beside the cores (VMEM) is not counted; the compiler's `bytes accessed` has it.
"""

import argparse
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from timing import Program, milliseconds, print_table
from tpu_compiler import device_of, lowered_for

from lowrank_optax.layers import BlockDense, BlockShuffle, LowRank, Structure, structured_linear

INPUTS, OUTPUTS, TOKENS = 1024, 4096, 2048
# Of a dense weight's parameters: 25, 25, 31 and 16 %.
STRUCTURES = (LowRank(204), BlockDense(226, 2), BlockShuffle(4), BlockShuffle(8))
# Of multiples of a TPU's 128 lanes.
TPU_STRUCTURES = (LowRank(256), BlockDense(256, 2), BlockShuffle(2), BlockShuffle(4))


def product(structure: Structure | None, x: jax.Array, weight: Any) -> jax.Array:
    """The product with a dense weight, or with a structured one."""
    return x @ weight if structure is None else structured_linear(x, weight, structure)


def with_gradients(structure: Structure | None, x: jax.Array, weight: Any, dy: jax.Array) -> Any:
    """The product, and the gradients of both its arguments."""
    y, backward = jax.vjp(lambda x, weight: product(structure, x, weight), x, weight)
    return y, backward(dy)


def arguments(structure: Structure | None, dtype: Any) -> tuple[jax.Array, Any, jax.Array]:
    """Inputs, weight and cotangent."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (TOKENS, INPUTS), dtype)
    dy = jax.random.normal(keys[1], (TOKENS, OUTPUTS), dtype)
    if structure is None:
        return x, jax.random.normal(keys[2], (INPUTS, OUTPUTS), dtype), dy
    return x, structure.init(keys[2], INPUTS, OUTPUTS, dtype=dtype), dy


def print_times(rounds: int) -> None:
    """Prints milliseconds, and how much faster each structure is."""
    cases = [None, *STRUCTURES]
    given = [arguments(case, jnp.float32) for case in cases]
    columns = []
    for backward in (False, True):
        programs = {}
        for case, (x, weight, dy) in zip(cases, given, strict=True):
            run = with_gradients if backward else product
            inputs = (x, weight, dy) if backward else (x, weight)
            step = jax.jit(lambda _, *inputs, run=run, case=case: run(case, *inputs))
            compiled = step.lower(None, *inputs).compile()
            program = Program(lambda _, *inputs, f=compiled: f(None, *inputs), None, *inputs)
            programs[str(case or "dense")] = program
        columns.append(milliseconds(programs, rounds))
    forward, both = columns
    rows = [
        [
            name,
            sum(x.size for x in jax.tree.leaves(weight)) / (INPUTS * OUTPUTS),
            forward[name],
            forward["dense"] / forward[name],
            both[name],
            both["dense"] / both[name],
        ]
        for name, (_, weight, _) in zip(forward, given, strict=True)
    ]
    title = f"{INPUTS} × {OUTPUTS}, {TOKENS} tokens, float32, {jax.default_backend()}"
    heads = [
        "weight",
        "parameters",
        "product, ms",
        "dense / it",
        "with gradients, ms",
        "dense / it",
    ]
    print_table(title, heads, rows)


def print_bytes() -> None:
    """Prints the bytes that programs for a v5e move, over those that they must."""
    rows = []
    for structure in (None, *TPU_STRUCTURES):
        x, weight, dy = jax.eval_shape(lambda s=structure: arguments(s, jnp.bfloat16))
        run = lambda x, weight, s=structure: product(s, x, weight)
        compiled = lowered_for(device_of("v5e"), run, x, weight).compile()
        must = 2 * sum(leaf.size for leaf in jax.tree.leaves((x, weight, dy)))
        moved = main_memory_bytes(compiled.as_text())
        rows.append([str(structure or "dense"), must / 2**20, moved / 2**20, moved / must])
    print_table("bfloat16, v5e", ["weight", "must, MiB", "moves, MiB", "ratio"], rows)


def main_memory_bytes(program: str) -> int:
    """Bytes that the entry of a compiled TPU program reads from and writes to main memory.

    Arrays elsewhere have a memory space in their layout, such as `S(1)`. A copy that is started
    names source and destination; what is passed on is not counted again where it ends.
    """
    passed_on = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
    passed_on |= {"copy-done", "slice-done"}
    types: dict[str, str] = {}
    total = 0
    for line in program[program.index("ENTRY") :].splitlines():
        found = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)", line)
        if found is None:
            continue
        name, made, operation, rest = found.groups()
        types[name] = made
        if operation in passed_on:
            continue
        if operation.endswith("-start"):  # the pair that it makes begins with its destination
            made = made.split("), (")[0].split(", ")[0]
        read = [
            types.get(operand, "") for operand in re.findall(r"%([\w.-]+)", rest.split("), ")[0])
        ]
        total += sum(map(_bytes_in_main_memory, [made, *read]))
    return total


def _bytes_in_main_memory(types: str) -> int:
    arrays = re.findall(r"(\w+?)(\d+)\[([\d,]*)\](\{[^}]*\})?", types)
    sizes = ((int(bits) // 8, shape) for _, bits, shape, layout in arrays if "S(" not in layout)
    return sum(
        math.prod([width, *map(int, filter(None, shape.split(",")))]) for width, shape in sizes
    )


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("times", "bytes"), default="times")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    print_bytes() if given.only == "bytes" else print_times(given.rounds)


if __name__ == "__main__":
    main()
