"""Time of a projected step against the products it cannot avoid, and of its refresh.

    python benchmarks/projection_step.py                  # the recipes, AdamW, the bare products
    python benchmarks/projection_step.py --optax-galore   # and optax.contrib.galore: a minute more
    python benchmarks/projection_step.py --scaling        # square weights of 512 to 4096, rank 64

Four 1024 × 2752 float32 weights at rank 128. The bare products are `w - lr * P @ (P.T @ g)`, or for
APOLLO, which lifts nothing, the one product and the scaling of the gradient. Every function is
jitted with its weights and state donated, and they take turns in one run.
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


def one_product(params: Any, gradients: Any, bases: Any) -> Any:
    """The one product of an APOLLO step, and the write of the weights."""

    def move(w: jax.Array, g: jax.Array, basis: jax.Array) -> jax.Array:
        return w - LEARNING_RATE * g * jnp.linalg.norm(basis.T @ g, axis=0)

    return jax.tree.map(move, params, gradients, bases)


def weights(seed: int, count: int, *shape: int) -> dict[str, jax.Array]:
    """Random weights by name."""
    names = [f"kernel_{i}" for i in range(count)]
    keys = jax.random.split(jax.random.key(seed), count)
    return {k: jax.random.normal(key, shape) for k, key in zip(names, keys, strict=True)}


def family(args: argparse.Namespace) -> None:
    """The table of all recipes for one shape."""
    params, gradients = (weights(seed, args.weights, args.rows, args.columns) for seed in (0, 1))
    drawn = weights(2, args.weights, args.rows, args.rank)
    bases = {name: jnp.linalg.qr(x)[0] for name, x in drawn.items()}

    def stepper(tx: optax.GradientTransformation) -> Stepper:
        return Stepper(optimizer_step(tx), (params, tx.init(params)), gradients)

    recipes = {
        "lro.galore": lro.galore,
        "lro.fira": lro.fira,
        "lro.dct_adamw": lro.dct_adamw,
        "lro.apollo": lro.apollo,
    }
    holds = {
        "bare products": Stepper(bare_products, params, gradients, bases),
        "one product": Stepper(one_product, params, gradients, bases),
        "optax.adamw": stepper(optax.adamw(LEARNING_RATE)),
        "lro.online_subspace_descent": stepper(
            lro.online_subspace_descent(LEARNING_RATE, args.rank)
        ),
    }
    refreshes = {}
    for name, recipe in recipes.items():
        holds[name] = stepper(recipe(LEARNING_RATE, args.rank, refresh_every=PERIOD))
        refreshes[name] = stepper(recipe(LEARNING_RATE, args.rank, refresh_every=1))
    refreshes["lro.ldadam"] = stepper(lro.ldadam(LEARNING_RATE, args.rank))
    if args.optax_galore:
        theirs = lambda gap: stepper(
            optax.contrib.galore(LEARNING_RATE, rank=args.rank, update_proj_gap=gap)
        )
        holds["optax.contrib.galore"], refreshes["optax.contrib.galore"] = theirs(10**9), theirs(1)

    hold = milliseconds(holds, args.rounds)  # the warm-up round takes the first refresh
    refresh = milliseconds(refreshes, 3)
    rows = []
    for name in {**hold, **refresh}:
        bare = hold["one product" if name == "lro.apollo" else "bare products"]
        time, refreshed = hold.get(name), refresh.get(name)
        mean = "–" if time is None else (time + ((refreshed or time) - time) / PERIOD) / bare
        held = ["–", "–"] if time is None else [time, time / bare]
        rows.append([name, *held, refreshed or "–", mean])
    title = f"{args.weights} × {args.rows} × {args.columns}, rank {args.rank}"
    columns = ["step", "hold ms", "hold / bare", "refresh ms", f"mean over {PERIOD} / bare"]
    print_table(title, columns, rows)
    if args.optax_galore:
        ratio = refresh["optax.contrib.galore"] / refresh["lro.galore"]
        print(f"refresh: optax.contrib.galore takes {ratio:.0f} times as long")


def scaling(args: argparse.Namespace) -> None:
    """The table of square weights of growing width at one rank."""
    rows = []
    for width in (512, 1024, 2048, 4096):
        params, gradients = weights(0, 1, width, width), weights(1, 1, width, width)
        steppers = {}
        for recipe in (lro.galore, lro.dct_adamw, lro.apollo):
            for every in (10**9, 1):
                tx = recipe(LEARNING_RATE, 64, refresh_every=every)
                carry = params, tx.init(params)
                key = f"{recipe.__name__} {'refresh' if every == 1 else 'hold'}"
                steppers[key] = Stepper(optimizer_step(tx), carry, gradients)
        times = milliseconds(steppers, args.rounds)
        rows.append([width, *times.values()])
    growth = [x / y / (4096 / 512) ** 2 for x, y in zip(rows[-1][1:], rows[0][1:], strict=True)]
    rows.append(["growth / d²", *growth])
    print_table("One d × d weight, rank 64, ms", ["d", *steppers], rows)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2752)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--optax-galore", action="store_true", help="also optax.contrib.galore")
    parser.add_argument("--scaling", action="store_true", help="times against the width instead")
    args = parser.parse_args()
    (scaling if args.scaling else family)(args)


if __name__ == "__main__":
    main()
