"""Transport problems, their optima by SciPy, and Mirror Sinkhorn in NumPy, in kernels."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linprog

import lowrank_optax as lro
from lowrank_optax.optimizers import MirrorSinkhorn, minimize_over_couplings

HALF = np.array([0.5, 0.5])
SWAP = np.array([[0.0, 1.0], [1.0, 0.0]])
# The example of the method's specification; its optimum is .45.
ROWS, COLUMNS = np.array([0.7, 0.3]), np.array([0.4, 0.6])
COST = np.array([[0.0, 1.0], [2.0, 0.5]])


def random_problem(n: int, m: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared distances of points in a square, over the largest, and random marginals."""
    rng = np.random.default_rng(seed)
    cost = np.sum((rng.random((n, 1, 2)) - rng.random((m, 2))) ** 2, axis=-1)
    return cost / cost.max(), rng.dirichlet(np.full(n, 3.0)), rng.dirichlet(np.full(m, 3.0))


def optimum(cost: Any, rows: Any, columns: Any, mask: Any = None) -> float:
    """The optimal value, by linear programming."""
    cost, rows, columns = (np.asarray(x, np.float64) for x in (cost, rows, columns))
    n, m = cost.shape
    sums = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    most = np.full(n * m, np.inf) if mask is None else np.where(np.ravel(mask), np.inf, 0)
    targets = np.concatenate([rows, columns * rows.sum() / columns.sum()])
    found = linprog(
        cost.ravel(), A_eq=sums, b_eq=targets, bounds=np.stack([np.zeros(n * m), most], 1)
    )
    assert found.status == 0, found.message
    return float(found.fun)


def iterates(
    gradient: Any, rows: Any, columns: Any, steps: int, bound: float, columns_first: bool = True
) -> list[np.ndarray]:
    """The iterates from the first on, by multiplications; the gradient is a function of them."""
    plan = np.outer(rows, columns)
    delta = np.abs(np.log(rows)).max() + np.abs(np.log(columns)).max()
    plans = [plan]
    for t in range(1, steps + 1):
        plan = plan * np.exp(-np.sqrt(delta / t) / bound * gradient(plan))
        if (t % 2 == 1) == columns_first:
            plan = plan / plan.sum(axis=0) * columns
        else:
            plan = (plan.T / plan.sum(axis=1) * rows).T
        plans.append(plan)
    return plans


def violation(plan: Any, rows: Any, columns: Any) -> float:
    """The largest difference from a marginal."""
    plan = np.asarray(plan, np.float64)
    return max(np.abs(plan.sum(1) - rows).max(), np.abs(plan.sum(0) - columns).max())


OPTIONS = ("average", "first", "bound", "learning_rate")


class Solved(NamedTuple):
    """State, iterate and answers of the solver; of `path`, of all steps from the start on."""

    state: Any
    coupling: jax.Array
    plan: jax.Array | None
    mean: jax.Array


@functools.partial(jax.jit, static_argnames=("steps", *OPTIONS))
def solve(
    cost: Any,
    rows: Any,
    columns: Any,
    steps: int,
    *,
    state: Any = None,
    mask: Any = None,
    **options: Any,
) -> Solved:
    """`mirror_sinkhorn` for a linear cost, in one program for each shape."""
    solver = lro.mirror_sinkhorn(rows, columns, mask=mask, **options)
    state = minimize_over_couplings(solver, lambda _: cost, steps, state=state)
    return Solved(state, solver.coupling(state), solver.plan(state), solver.plan(state, False))


@functools.partial(jax.jit, static_argnames=OPTIONS)
def path(costs: Any, rows: Any, columns: Any, slope: Any = 0.0, **options: Any) -> Solved:
    """Every step for costs ``[steps, n, m]``; gradients are the cost and ``slope`` iterates."""
    solver = lro.mirror_sinkhorn(rows, columns, **options)
    read = lambda state: Solved(state, solver.coupling(state), None, solver.plan(state, False))

    def step(state: Any, cost: Any) -> Any:
        state = solver.update(cost + slope * solver.coupling(state), state)
        return state, read(state)

    start = solver.init()
    seen = jax.lax.scan(step, start, costs)[1]
    return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), read(start), seen)


def repeated(cost: Any, steps: int) -> np.ndarray:
    """The same cost at every step."""
    return np.broadcast_to(cost, (steps, *np.shape(cost)))


transport = functools.partial(jax.jit, static_argnames=("steps", *OPTIONS))(lro.optimal_transport)
rounded = jax.jit(lro.round_to_polytope)


def run(solver: MirrorSinkhorn, gradient: Any, steps: int, **kwargs: Any) -> Any:
    """The state after steps, under jit."""
    return jax.jit(lambda: minimize_over_couplings(solver, gradient, steps, **kwargs))()


def constant(cost: Any) -> Any:
    """The gradient of a linear cost."""
    return lambda coupling: jnp.asarray(cost, jnp.float32)
