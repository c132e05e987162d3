"""Time and temporary memory of a training step of a transformer block with a few-bit GELU.

    python benchmarks/few_bit_step.py
    python benchmarks/few_bit_step.py --markdown          # the table of the documentation
    python benchmarks/few_bit_step.py --width 64 --batch 2 --length 32 --rounds 3

A step is forward, backward and AdamW of pre-norm blocks (attention, and an MLP with GELU) in
float32. The GELUs take turns in one run: ``jax.nn.gelu``, 1 to 4 bits, ``jax.nn.gelu`` under
``jax.checkpoint``, and a ``custom_vjp`` that keeps x and computes the derivative from it. With
``--frozen`` the product after the GELU is not trained, and so needs no input kept.
"""

import argparse
from collections.abc import Callable
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from timing import Stepper, milliseconds, print_table

import lowrank_optax as lro

RESULTS = Path(__file__).parent / "results" / "few_bit_step.json"
PLAIN = "jax.nn.gelu"


@jax.custom_vjp
def gelu_of_x(x: jax.Array) -> jax.Array:
    """GELU that keeps x alone."""
    return jax.nn.gelu(x)


gelu_of_x.defvjp(
    lambda x: (jax.nn.gelu(x), x),
    lambda x, gradient: jax.vjp(jax.nn.gelu, x)[1](gradient),
)

GELUS: dict[str, Callable[[jax.Array], jax.Array]] = {
    PLAIN: jax.nn.gelu,
    **{f"few bits: {b}": functools.partial(lro.activations.gelu, bits=b) for b in (1, 2, 3, 4)},
    "jax.checkpoint": jax.checkpoint(jax.nn.gelu),
    "custom_vjp, keeps x": gelu_of_x,
}


def init_block(key: jax.Array, width: int) -> dict[str, jax.Array]:
    """The matrices of a block."""
    shapes = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) * shape[0] ** -0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def block(params: Any, x: jax.Array, heads: int, gelu: Callable[..., jax.Array]) -> jax.Array:
    """``x``, ``[batch, length, width]``, after attention and MLP."""
    split = lambda y: y.reshape(*y.shape[:-1], heads, -1)
    q, k, v = jnp.split(jax.nn.standardize(x) @ params["qkv"], 3, axis=-1)
    attended = jax.nn.dot_product_attention(split(q), split(k), split(v), is_causal=True)
    x += attended.reshape(x.shape) @ params["out"]
    return x + gelu(jax.nn.standardize(x) @ params["up"]) @ params["down"]


def stepper(gelu: Callable[..., jax.Array], args: argparse.Namespace) -> Stepper:
    """A training step with this GELU."""
    blocks = [init_block(k, args.width) for k in jax.random.split(jax.random.key(0), args.layers)]
    frozen = [{"down": b.pop("down")} if args.frozen else {} for b in blocks]
    x = jax.random.normal(jax.random.key(1), (args.batch, args.length, args.width))
    tx = optax.adamw(1e-4)

    def step(carry: Any, frozen: Any, x: jax.Array) -> Any:
        def loss(blocks: Any) -> jax.Array:
            y = x
            for trained, rest in zip(blocks, frozen, strict=True):
                y = block({**trained, **rest}, y, args.heads, gelu)
            return jnp.mean(jnp.square(y))

        blocks, state = carry
        updates, state = tx.update(jax.grad(loss)(blocks), state, blocks)
        return optax.apply_updates(blocks, updates), state

    return Stepper(step, (blocks, tx.init(blocks)), frozen, x)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each GELU."""
    steppers = {name: stepper(gelu, args) for name, gelu in GELUS.items()}
    times = milliseconds(steppers, args.rounds)
    return [
        {
            "gelu": name,
            "milliseconds": times[name],
            "over_plain": times[name] / times[PLAIN],
            "temporary_bytes": each.compiled.memory_analysis().temp_size_in_bytes,
        }
        for name, each in steppers.items()
    ]


COLUMNS = ["", "ms", "over plain", "temporaries, MiB"]


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The rows as they are printed."""
    return [
        [
            row["gelu"],
            f"{row['milliseconds']:.3g}",
            f"{row['over_plain']:.3f}",
            f"{row['temporary_bytes'] / 2**20:.3g}",
        ]
        for row in rows
    ]


def main() -> None:
    """Measures, writes the numbers and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"layers": 2, "width": 512, "heads": 8, "batch": 4, "length": 256, "rounds": 41}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--frozen", action="store_true", help="do not train the second product")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = measure(args)
    shape = {k: getattr(args, k) for k in (*sizes, "frozen")}
    device = jax.devices()[0].device_kind
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**shape, "device": device, "rows": rows}, indent=1) + "\n")
    if args.markdown:
        print("|" + "|".join(f" {c} " for c in COLUMNS) + "|")
        print("|---" + "|--:" * (len(COLUMNS) - 1) + "|")
        for row in table(rows):
            print("|" + "|".join(f" {x} " for x in row) + "|")
        return
    title = f"{args.layers} blocks of width {args.width}, {args.batch} x {args.length} tokens"
    print_table(f"{title}, float32, {device}", COLUMNS, table(rows))


if __name__ == "__main__":
    main()
