"""Time of a step with moments in fewer bits, against AdamW's and against the bytes it must move.

    python benchmarks/low_bit_step.py
    python benchmarks/low_bit_step.py --rows 4096 --columns 11008 --weights 8   # on a GPU or TPU

`lro.low_bit(optax.adamw)` is an optax transformation, `lro.fused_adamw` moves the parameters too. A
floor is the time in which the same device copies as many bytes as the step must read and write:
gradient, parameter and state. Every function is jitted, with what it replaces donated, and they
take turns in one run.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from projection_step import optimizer_step, weights
from timing import Stepper, milliseconds, print_table

import lowrank_optax as lro

LEARNING_RATE = 1e-3


def nbytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2752)
    parser.add_argument("--rank", type=int, help="of GaLore (default: rows / 16)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    dtype, rank = jnp.dtype(args.dtype), args.rank or args.rows // 16
    params, gradients = (
        optax.tree.cast(weights(seed, args.weights, args.rows, args.columns), dtype)
        for seed in (0, 1)
    )
    galore = lambda bits: lro.galore(LEARNING_RATE, rank, refresh_every=None, state_bits=bits)
    transformations = {
        "optax.adamw": optax.adamw(LEARNING_RATE),
        "low_bit, 8 bits": lro.low_bit(optax.adamw(LEARNING_RATE), 8),
        "low_bit, 4 bits": lro.low_bit(optax.adamw(LEARNING_RATE), 4),
        f"galore, rank {rank}": galore(None),
        f"galore, rank {rank}, 8 bits": galore(8),
    }
    steppers, moved = {}, {}
    for name, tx in transformations.items():
        state = jax.jit(tx.init)(params)
        state = jax.jit(tx.update)(gradients, state, params)[1]  # a basis, where there is one
        steppers[name] = Stepper(optimizer_step(tx), (params, state), gradients)
        moved[name] = 3 * nbytes(params) + 2 * nbytes(state)
    for bits in (8, 4):
        fused = lro.fused_adamw(LEARNING_RATE, bits=bits)
        state = jax.jit(fused.init)(params)
        step = lambda carry, gradients, fused=fused: fused.step(gradients, carry[1], carry[0])
        name = f"fused_adamw, {bits} bits"
        steppers[name] = Stepper(step, (params, state), gradients)
        moved[name] = 3 * nbytes(params) + 2 * nbytes(state)
    # A copy reads and writes: half as many elements as bytes are moved, on one long array.
    block = jnp.zeros(nbytes(params) // 4, jnp.float32)
    steppers["copy"] = Stepper(lambda x: x + 1, block)
    times = milliseconds(steppers, args.rounds)
    speed = 2 * block.nbytes / times["copy"]  # bytes in a millisecond
    rows = [
        [name, ms, ms / times["optax.adamw"], moved[name] / 1e6, moved[name] / speed / ms]
        for name, ms in times.items()
        if name != "copy"
    ]
    print_table(
        f"{args.weights} weights {args.rows} × {args.columns}, {dtype}, "
        f"{jax.devices()[0].device_kind}; a copy moves {speed / 1e6:.3g} GB/s",
        ["step", "ms", "over adamw", "MB to move", "share of copy speed"],
        rows,
    )


if __name__ == "__main__":
    main()
