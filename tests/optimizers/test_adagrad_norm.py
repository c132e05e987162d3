"""AdaGrad-Norm: AdaGrad on one number, its own sums otherwise, and convergence at any rate."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

KEY = jax.random.key(0)


def run(tx: optax.GradientTransformation, gradients: list[Any]) -> list[Any]:
    state, all_updates = tx.init(gradients[0]), []
    for gradient in gradients:
        updates, state = tx.update(gradient, state)
        all_updates.append(updates)
    return all_updates


@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_on_one_number_it_is_adagrad(axis: int | None, eps: float) -> None:
    gradients = [{"x": g} for g in jax.random.normal(KEY, (20,))]
    mine = run(lro.adagrad_norm(0.3, 0.01, eps, axis=axis), gradients)
    theirs = run(optax.adagrad(0.3, 0.01, eps), gradients)
    jax.tree.map(lambda a, b: assert_close(a, b), mine, theirs)


def test_each_entry_a_slice_is_adagrad() -> None:
    gradients = [{"w": g, "b": g[0]} for g in jax.random.normal(KEY, (5, 3, 4))]
    mine = run(lro.adagrad_norm(0.3, axis=(0, 1)), gradients)
    theirs = run(optax.adagrad(0.3), gradients)
    jax.tree.map(lambda a, b: assert_close(a, b, 100), mine, theirs)


def test_one_sum_is_of_the_squared_norms_of_all_leaves() -> None:
    gradients = [{"w": g, "b": g[0]} for g in jax.random.normal(KEY, (6, 3, 4))]
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
    gradient = jax.random.normal(KEY, shape)
    tx = lro.scale_by_adagrad_norm(0.25, 0.0, axis)
    state = tx.init(gradient)
    assert state.sum_of_squares.shape == kept
    updates, state = tx.update(gradient, state)
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
    _, sizes = jax.lax.scan(step, (x, tx.init(x)), length=count)
    assert sizes[-1] < 1e-3
    assert np.all(np.isfinite(sizes))


def test_without_gradients_from_zero_nothing_moves() -> None:
    zeros = {"w": jnp.zeros((2, 2))}
    for axis in (None, -1):
        updates = run(lro.adagrad_norm(0.1, 0.0, 0.0, axis=axis), [zeros, zeros])
        assert all(np.all(np.asarray(u["w"]) == 0) for u in updates)


def test_state_is_one_number() -> None:
    state = lro.adagrad_norm(0.1).init({"w": jnp.zeros((5, 7)), "b": jnp.zeros(7)})
    assert sum(x.size for x in jax.tree.leaves(state)) == 1


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="initial_accumulator_value=-1"):
        lro.adagrad_norm(0.1, -1.0)
    with pytest.raises(ValueError, match="eps=-1"):
        lro.scale_by_adagrad_norm(eps=-1.0)
    with pytest.raises(TypeError, match="axis='rows' must be an int"):
        lro.adagrad_norm(0.1, axis="rows")
