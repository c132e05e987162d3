"""Problems with known minima: optax's four, and a quadratic in a matrix of full rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from harness.row import Row
from harness.trees import Tree

# Every problem is a subtree of its own, so that one run solves them all.
MINIMA = {
    "parabola": jnp.array([1.0, -1.0, 1.0]),
    "rosenbrock": jnp.array([1.0, 1.0]),
    "matrix_parabola": jnp.array([[1.0, -1.0], [0.0, 2.0]]),
    "tuple_parabola": (jnp.array([1.0, -1.0, 1.0]), jnp.array([[2.0, 0.0], [1.0, -1.0]])),
    "quadratic": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32),
}
CURVATURE = jnp.array([0.5, 0.75, 1.0, 1.25, 1.5, 2.0])[:, None]


def objective(params: Tree) -> jax.Array:
    """The sum of the problems' objectives; zero at `MINIMA` and nowhere else."""
    x, y = params["rosenbrock"]
    rosenbrock = (1.0 - x) ** 2 + 100.0 * (y - x**2) ** 2
    squares = jax.tree.map(lambda w, minimum: (w - minimum) ** 2, params, MINIMA)
    parabolas = {**squares, "rosenbrock": 0.0, "quadratic": CURVATURE * squares["quadratic"]}
    return rosenbrock + sum(jnp.sum(x) for x in jax.tree.leaves(parabolas))


def check_converges(row: Row) -> None:
    spec = row.convergence
    assert spec is not None, "the row says nothing of its convergence"
    tx = row.make(learning_rate=spec.learning_rate, **spec.overrides)

    def body(carry: tuple[Tree, Tree], _: None) -> tuple[tuple[Tree, Tree], None]:
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.zeros_like, MINIMA)
    carry = params, tx.init(params)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, length=spec.steps))(carry)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(MINIMA), strict=True
    ):
        distance = np.max(np.abs(np.asarray(x) - np.asarray(y)))
        assert distance < spec.tolerance, f"{jax.tree_util.keystr(path)} is {distance:.2g} away"
