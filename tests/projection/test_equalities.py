"""Projected optimizers that are, exactly, another optimizer."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import moved, normal_gradients, orthonormal, run

SHAPE = (4, 6)
STACKED = lro.WeightDimensionNumbers(-2, -1)


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_a_complete_basis_is_the_inner_optimizer_in_rotated_coordinates() -> None:
    basis, weight, inputs = orthonormal(4, 4), _normal(0, *SHAPE), _normal(1, 16, 4)
    targets = _normal(2, 16, 6)
    loss = lambda w: jnp.mean((inputs @ w - targets) ** 2)
    rotated_loss = lambda v: loss(basis @ v)  # v = Pᵀ W
    inner = optax.adam(0.05)
    tx = lro.scale_by_projection(inner, lro.subspaces.fixed(basis), side="rows")

    @jax.jit
    def step(weight: Any, state: Any, rotated: Any, inner_state: Any) -> tuple[Any, ...]:
        updates, state = tx.update({"kernel": jax.grad(loss)(weight)}, state)
        turned, inner_state = inner.update(jax.grad(rotated_loss)(rotated), inner_state)
        return weight + updates["kernel"], state, rotated + turned, inner_state

    rotated = basis.T @ weight
    state, inner_state = tx.init({"kernel": weight}), inner.init(rotated)
    for _ in range(6):
        weight, state, rotated, inner_state = step(weight, state, rotated, inner_state)
    np.testing.assert_allclose(weight, basis @ rotated, atol=2e-5)


def test_a_fixed_basis_is_lora_with_a_frozen_factor_merged_at_every_step() -> None:
    basis, weight, inputs = 2 * _normal(3, 8, 3), _normal(0, 8, 6), _normal(1, 16, 8)
    targets = _normal(2, 16, 6)
    loss = lambda w: jnp.mean((jnp.tanh(inputs @ w) - targets) ** 2)
    adam = optax.adam(0.05)
    rule = lro.subspaces.fixed(basis, orthonormal=False)
    tx = lro.scale_by_projection(adam, rule, side="rows")

    @jax.jit
    def lora_step(frozen: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        adapted = lambda factor: loss(frozen + basis @ factor)
        factor = jnp.zeros((3, 6))
        updates, state = adam.update(jax.grad(adapted)(factor), state)
        return frozen + basis @ optax.apply_updates(factor, updates), state

    @jax.jit
    def projected_step(weight: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        updates, state = tx.update({"kernel": jax.grad(loss)(weight)}, state)
        return weight + updates["kernel"], state

    merged, projected = weight, weight
    lora_state, state = adam.init(jnp.zeros((3, 6))), tx.init({"kernel": weight})
    for _ in range(8):
        merged, lora_state = lora_step(merged, lora_state)
        projected, state = projected_step(projected, state)
    assert jnp.abs(merged - weight).max() > 0.1
    np.testing.assert_allclose(projected, merged, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["products", "fft"])
def test_all_cosines_and_gradient_descent_are_gradient_descent(transform: Any) -> None:
    gradients = normal_gradients(SHAPE, 3)
    rule = lro.subspaces.dct(4, transform=transform)
    tx = lro.scale_by_projection(optax.identity(), rule, refresh_every=1)
    expected = sum(np.asarray(g["kernel"]) for g in gradients)
    np.testing.assert_allclose(moved(tx, SHAPE, gradients), expected, atol=1e-5)


@pytest.mark.parametrize("side", ["columns", "both"])
def test_heavy_ball_in_turning_complete_bases_is_heavy_ball_if_rotated(side: Any) -> None:
    gradients = normal_gradients((5, 5), 6)
    rule = lro.subspaces.svd(5)
    make = lambda on_refresh: lro.scale_by_projection(
        optax.trace(0.9), rule, refresh_every=2, side=side, on_refresh=on_refresh
    )
    expected = moved(optax.trace(0.9), (5, 5), gradients)
    np.testing.assert_allclose(moved(make("rotate"), (5, 5), gradients), expected, atol=1e-4)
    assert np.abs(moved(make("reset"), (5, 5), gradients) - expected).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("residual", "on_refresh"), [("fira", "reset"), ("error_feedback", "rotate")]
)
def test_a_stack_of_layers_is_the_layers_one_by_one(residual: Any, on_refresh: Any) -> None:
    gradients = normal_gradients((3, 5, 7), 4)
    make = lambda spec: lro.scale_by_projection(
        optax.scale_by_adam(),
        lro.subspaces.svd(2),
        residual=residual,
        on_refresh=on_refresh,
        refresh_every=2,
        weight_dimension_numbers=spec,
    )
    stacked = moved(make(STACKED), (3, 5, 7), gradients)
    layers = [[{"kernel": g["kernel"][i]} for g in gradients] for i in range(3)]
    one_by_one = [moved(make(None), (5, 7), layer) for layer in layers]
    np.testing.assert_allclose(stacked, np.stack(one_by_one), atol=2e-4)


@pytest.mark.slow
def test_a_state_restored_between_two_refreshes_goes_on_as_if_never_stopped() -> None:
    gradients = normal_gradients((5, 7), 8)
    make = lambda: lro.scale_by_projection(
        optax.scale_by_adam(), lro.subspaces.random(2), refresh_every=3, seed=5
    )
    start = {"kernel": jnp.zeros((5, 7))}
    whole = run(make(), start, gradients)
    params, state = jax.tree.map(np.asarray, whole[3])  # saved after four steps
    restored = jax.tree.map(jnp.asarray, state)
    step = jax.jit(make().update)  # of another process: nothing is kept outside the state
    for gradient in gradients[4:]:
        updates, restored = step(gradient, restored, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(params, whole[-1][0], atol=1e-5)
    chex.assert_trees_all_close(restored, whole[-1][1], atol=1e-5)
