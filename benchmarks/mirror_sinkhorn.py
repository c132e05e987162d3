"""Mirror Sinkhorn against Sinkhorn at fixed temperatures: gaps to the optimum, after rounding.

    python benchmarks/mirror_sinkhorn.py             # runs, and writes the results file
    python benchmarks/mirror_sinkhorn.py --markdown  # the table as Markdown

Random points in a square, squared distances over the largest, random marginals; the optimum is by
linear programming. Rows are numbers of half-scalings. "noisy" adds a sign times 0.5 to every cost
at every step. Means over seeds.
"""

import argparse
import functools
import json
from pathlib import Path
import time
from typing import Any

from family_table import Column, print_columns
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linprog
from scipy.sparse import eye_array, kron, vstack

import lowrank_optax as lro
from lowrank_optax.optimizers import minimize_over_couplings

RESULTS = Path(__file__).parent / "results"
EPSILONS = (0.1, 0.01, 0.001)
NOISE = 0.5
METHODS = ("average", "last", *(f"sinkhorn {e}" for e in EPSILONS), "noisy average", "noisy last")


@functools.cache
def problem(size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Cost, marginals and the optimum."""
    rng = np.random.default_rng(seed)
    cost = np.sum((rng.random((size, 1, 2)) - rng.random((size, 2))) ** 2, axis=-1)
    cost /= cost.max()
    rows, columns = rng.dirichlet(np.full(size, 3.0), 2)
    ones = np.ones((1, size))
    sums = vstack([kron(eye_array(size), ones), kron(ones, eye_array(size))])
    found = linprog(cost.ravel(), A_eq=sums, b_eq=np.concatenate([rows, columns]))
    return cost, rows, columns, float(found.fun)


@functools.partial(jax.jit, static_argnames=("steps", "average"))
def noisy(cost: Any, rows: Any, columns: Any, key: Any, steps: int, average: Any) -> jax.Array:
    """The rounded plan, from costs with signs added."""
    solver = lro.mirror_sinkhorn(rows, columns, bound=1 + NOISE, average=average)
    signs = lambda key: NOISE * jax.random.rademacher(key, cost.shape, cost.dtype)
    gradient = lambda coupling, key: cost + signs(key)
    return solver.plan(minimize_over_couplings(solver, gradient, steps, key=key))


@functools.partial(jax.jit, static_argnames="steps")
def sinkhorn(cost: Any, rows: Any, columns: Any, epsilon: Any, steps: int) -> jax.Array:
    """The rounded plan of Sinkhorn's algorithm in logarithms."""

    def sweep(column: jax.Array, _: None) -> tuple[jax.Array, None]:
        row = jnp.log(rows) - jax.nn.logsumexp(column - cost / epsilon, axis=1)
        column = jnp.log(columns) - jax.nn.logsumexp(row[:, None] - cost / epsilon, axis=0)
        return column, None

    column, _ = jax.lax.scan(sweep, jnp.zeros_like(columns), length=steps // 2)
    row = jnp.log(rows) - jax.nn.logsumexp(column - cost / epsilon, axis=1)
    plan = jnp.exp(row[:, None] + column - cost / epsilon)
    return lro.round_to_polytope(plan, rows, columns)


def gap(method: str, steps: int, size: int, seed: int) -> float:
    """How far above the optimum the rounded plan is."""
    cost, rows, columns, best = problem(size, seed)
    args = [jnp.asarray(x, jnp.float32) for x in (cost, rows, columns)]
    kind, _, detail = method.partition(" ")
    if kind == "sinkhorn":
        plan = sinkhorn(*args, float(detail), steps)
    elif kind == "noisy":
        average = "uniform" if detail == "average" else "last"
        plan = noisy(*args, jax.random.key(seed), steps, average)
    else:
        average = "uniform" if kind == "average" else "last"
        plan = lro.optimal_transport(*args, steps, average=average).plan
    return float(np.sum(cost * np.asarray(plan, np.float64))) - best


def main() -> None:
    """Runs all, writes the results and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=40)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "mirror_sinkhorn.json")
    args = parser.parse_args()
    began = time.perf_counter()
    gaps = {
        method: {
            str(steps): [round(gap(method, steps, args.size, s), 6) for s in range(args.seeds)]
            for steps in args.steps
        }
        for method in METHODS
    }
    setting = {"size": args.size, "seeds": args.seeds, "noise": NOISE}
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps({"setting": setting, "gaps": gaps}, indent=1) + "\n")
    mean = lambda method: lambda steps: f"{np.mean(gaps[method][str(steps)]):.4f}"
    columns = [Column("half-scalings", str), *(Column(name, mean(name)) for name in METHODS)]
    title = f"gap to the optimum, {args.size} x {args.size}, mean of {args.seeds} problems"
    print_columns(title, args.steps, columns, args.markdown)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
