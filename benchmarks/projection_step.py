"""Time of a GaLore step against the two products it cannot avoid, and of its refresh.

    python benchmarks/projection_step.py                  # ours, AdamW and the bare products
    python benchmarks/projection_step.py --optax-galore   # and optax.contrib.galore: a minute more

Four 1024 × 2752 float32 weights at rank 128. The bare products are `w - lr * P @ (P.T @ g)`. Every
function is jitted with its weights and state donated, and they take turns in one run.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from timing import Stepper, milliseconds, print_table

import lowrank_optax as lro

LEARNING_RATE, PERIOD = 1e-2, 200


def optimizer_step(tx: optax.GradientTransformation) -> Any:
    """A step on the carry (params, state)."""

    def step(carry: Any, gradients: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def bare_products(params: Any, gradients: Any, bases: Any) -> Any:
    """The two products of a projected step, and the write of the weights."""
    move = lambda w, g, basis: w - LEARNING_RATE * basis @ (basis.T @ g)
    return jax.tree.map(move, params, gradients, bases)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2752)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--optax-galore", action="store_true", help="also optax.contrib.galore")
    args = parser.parse_args()

    names = [f"kernel_{i}" for i in range(args.weights)]
    draw = lambda seed, *shape: {
        name: jax.random.normal(key, shape)
        for name, key in zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True)
    }
    params, gradients = draw(0, args.rows, args.columns), draw(1, args.rows, args.columns)
    bases = {k: jnp.linalg.qr(v)[0] for k, v in draw(2, args.rows, args.rank).items()}

    def stepper(tx: optax.GradientTransformation) -> Stepper:
        return Stepper(optimizer_step(tx), (params, tx.init(params)), gradients)

    holds = {
        "bare products": Stepper(bare_products, params, gradients, bases),
        "optax.adamw": stepper(optax.adamw(LEARNING_RATE)),
        "lro.galore": stepper(lro.galore(LEARNING_RATE, args.rank)),
    }
    refreshes = {"lro.galore": stepper(lro.galore(LEARNING_RATE, args.rank, refresh_every=1))}
    if args.optax_galore:
        theirs = lambda gap: stepper(
            optax.contrib.galore(LEARNING_RATE, rank=args.rank, update_proj_gap=gap)
        )
        holds["optax.contrib.galore"], refreshes["optax.contrib.galore"] = theirs(10**9), theirs(1)

    hold = milliseconds(holds, args.rounds)  # the warm-up round takes the first refresh
    refresh = milliseconds({k: v for k, v in refreshes.items() if k in holds}, 2)
    bare = hold["bare products"]
    rows = []
    for name, time in hold.items():
        refreshed = refresh.get(name, time)
        mean = time + (refreshed - time) / PERIOD
        rows.append([name, time, time / bare, refreshed if name in refresh else "–", mean / bare])
    title = f"{args.weights} × {args.rows} × {args.columns}, rank {args.rank}"
    columns = ["step", "hold ms", "hold / bare", "refresh ms", f"mean over {PERIOD} / bare"]
    print_table(title, columns, rows)
    if args.optax_galore:
        ratio = refresh["optax.contrib.galore"] / refresh["lro.galore"]
        print(f"refresh: optax.contrib.galore takes {ratio:.0f} times as long")


if __name__ == "__main__":
    main()
