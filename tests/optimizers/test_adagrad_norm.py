"""AdaGrad-Norm: AdaGrad on one number, its own sums otherwise, and convergence at any rate."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def run(tx: optax.GradientTransformation, gradients: list[Any]) -> list[Any]:
    """The updates for a list of gradients."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *gradients)
    step = lambda state, gradient: tx.update(gradient, state)[::-1]
    scan = jax.jit(lambda gs: jax.lax.scan(step, tx.init(gradients[0]), gs)[1])
    found = jax.tree.map(np.asarray, scan(stacked))
    at = lambda i: jax.tree.map(lambda x: x[i], found)
    return [at(i) for i in range(len(gradients))]


@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_on_one_number_it_is_adagrad(axis: int | None, eps: float) -> None:
    gradients = [{"x": g} for g in normal(20)]
    mine = run(lro.adagrad_norm(0.3, 0.01, eps, axis=axis), gradients)
    theirs = run(optax.adagrad(0.3, 0.01, eps), gradients)
    jax.tree.map(lambda a, b: assert_close(a, b), mine, theirs)


def test_each_entry_a_slice_is_adagrad() -> None:
    gradients = [{"w": g, "b": g[0]} for g in normal(5, 3, 4)]
    mine = run(lro.adagrad_norm(0.3, axis=(0, 1)), gradients)
    theirs = run(optax.adagrad(0.3), gradients)
    jax.tree.map(lambda a, b: assert_close(a, b, 100), mine, theirs)


def test_one_sum_is_of_the_squared_norms_of_all_leaves() -> None:
    gradients = [{"w": g, "b": g[0]} for g in normal(6, 3, 4)]
    found = run(lro.scale_by_adagrad_norm(0.5, 0.0), gradients)
    total = 0.5
    for gradient, update in zip(gradients, found, strict=True):
        flat = np.concatenate([np.ravel(g).astype(np.float64) for g in gradient.values()])
        total += flat @ flat
        for name, g in gradient.items():
            assert_close(update[name], np.asarray(g) / total**0.5, 100)


@pytest.mark.parametrize(
    ("axis", "shape", "kept"),
    [
        (-1, (3, 4), (1, 4)),
        (0, (3, 4), (3, 1)),
        (-1, (3, 3, 2, 5), (1, 1, 1, 5)),
        ((0, -1), (2, 3, 4), (2, 1, 4)),
        ((0, -1), (4,), (4,)),
        (1, (4,), (1,)),
        (-1, (), ()),
        (-1, (0, 3), (1, 3)),
        (-1, (3, 0), (1, 0)),
    ],
)
def test_slices_have_sums_of_their_own(axis: Any, shape: tuple, kept: tuple) -> None:
    gradient = normal(*shape)
    tx = lro.scale_by_adagrad_norm(0.25, 0.0, axis)
    assert jax.eval_shape(tx.init, gradient).sum_of_squares.shape == kept
    updates, state = jax.jit(lambda g: tx.update(g, tx.init(g)))(gradient)
    summed = tuple(i for i, d in enumerate(shape) if kept[i] == 1 and d != 1)
    squares = np.sum(np.asarray(gradient, np.float64) ** 2, axis=summed, keepdims=True)
    assert_close(state.sum_of_squares, 0.25 + squares)
    assert_close(updates, gradient / np.sqrt(0.25 + squares), 100)


@pytest.mark.parametrize("learning_rate", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("curvature", [0.1, 50.0])
def test_it_converges_on_a_parabola_at_any_rate(learning_rate: float, curvature: float) -> None:
    tx = lro.adagrad_norm(learning_rate, 0.01)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        x, state = carry
        updates, state = tx.update(curvature * x, state)
        x = optax.apply_updates(x, updates)
        return (x, state), jnp.abs(x)

    x = jnp.float32(1.0)
    count = 300_000 if learning_rate < 1 else 3000
    _, sizes = jax.jit(lambda c: jax.lax.scan(step, c, length=count))((x, tx.init(x)))
    assert sizes[-1] < 1e-3
    assert np.all(np.isfinite(sizes))


def test_without_gradients_from_zero_nothing_moves() -> None:
    zeros = {"w": jnp.zeros((2, 2))}
    for axis in (None, -1):
        updates = run(lro.adagrad_norm(0.1, 0.0, 0.0, axis=axis), [zeros, zeros])
        assert all(np.all(np.asarray(u["w"]) == 0) for u in updates)


def test_state_is_one_number() -> None:
    params = {"w": jnp.zeros((5, 7)), "b": jnp.zeros(7)}
    state = jax.eval_shape(lro.adagrad_norm(0.1).init, params)
    assert sum(x.size for x in jax.tree.leaves(state)) == 1


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="initial_accumulator_value=-1"):
        lro.adagrad_norm(0.1, -1.0)
    with pytest.raises(ValueError, match="eps=-1"):
        lro.scale_by_adagrad_norm(eps=-1.0)
    with pytest.raises(TypeError, match="axis='rows' must be an int"):
        lro.adagrad_norm(0.1, axis="rows")
