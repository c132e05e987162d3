"""Gradients that arrive projected, as a layer gives them that projects in its backward pass."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import first, normal_gradients, run

SHAPES = {"rows": (6, 9), "columns": (9, 6)}
SIDES = pytest.mark.parametrize("side", SHAPES)
RULES = {
    "svd": lro.subspaces.svd(2),
    "dct": lro.subspaces.dct(2),
    "random": lro.subspaces.random(2),
    "online_pca": lro.subspaces.online_pca(2, initial=lro.subspaces.svd(2)),
}


def _projected(rule: str, **options: Any) -> Any:
    options = {"refresh_every": 3, **options}
    return lro.scale_by_projection(optax.scale_by_adam(), RULES[rule], **options)


def _by_the_state(rule: str, state: Any, tree: Any, side: str) -> Any:
    """The projected gradient, by the basis that the state holds."""
    view = lro.View.of(tree["kernel"], -2 if side == "rows" else -1, 2)
    at = state.basis
    if rule != "random":  # whose one basis is for all leaves
        at = jax.tree.map(lambda x: x["kernel"], at, is_leaf=lambda x: isinstance(x, dict))
    return {"kernel": RULES[rule].project(at, tree["kernel"], view)}


@pytest.mark.combinations(1)
@SIDES
@pytest.mark.parametrize("rule", ["svd", "dct", "random"])
def test_they_give_the_same_updates_as_whole_ones_while_the_basis_stays(
    rule: str, side: str
) -> None:
    gradients = normal_gradients(SHAPES[side], 3)
    params = {"kernel": jnp.ones(SHAPES[side])}
    tx = _projected(rule, side=side)
    whole = run(tx, params, gradients)
    (params, state), step = whole[0], jax.jit(tx.update)
    for gradient in gradients[1:]:
        small = _by_the_state(rule, state, gradient, side)
        assert small["kernel"].size < gradient["kernel"].size
        updates, state = step(small, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], whole[-1][0]["kernel"], atol=1e-5)
    chex.assert_trees_all_close(state, whole[-1][1], atol=1e-5)


@pytest.mark.parametrize("rule", ["svd", "dct", "online_pca"])
def test_a_basis_that_is_due_waits_for_a_whole_gradient(rule: str) -> None:
    gradients = normal_gradients((6, 9), 4)
    params = {"kernel": jnp.ones((6, 9))}
    tx = _projected(rule, refresh_every=1)
    step = jax.jit(tx.update)
    _, first = step(gradients[0], tx.init(params), params)
    small = _by_the_state(rule, first, gradients[1], "rows")
    _, held = step(small, first, params)
    chex.assert_trees_all_equal((held.basis, held.next_refresh), (first.basis, first.next_refresh))
    _, found = step(gradients[2], held, params)
    assert int(found.next_refresh["kernel"]) == 3
    old, new = (jax.tree.leaves(s.basis)[0] for s in (held, found))
    assert (old != new).any()


@pytest.mark.parametrize("on_refresh", ["keep", "rotate"])
def test_a_projected_gradient_is_lifted_with_the_basis_it_was_projected_with(
    on_refresh: Any,
) -> None:
    """Also at the steps at which a random basis, for which no gradient is needed, is due."""
    rule, params = lro.subspaces.random(2), {"kernel": jnp.ones((6, 9))}
    tx = lro.scale_by_projection(optax.identity(), rule, refresh_every=2, on_refresh=on_refresh)
    state, step, seeds = tx.init(params), jax.jit(tx.update), []
    view = lro.View.of(params["kernel"], -2, 2)
    for gradient in normal_gradients((6, 9), 4):
        small = _by_the_state("random", state, gradient, "rows")
        expected = rule.lift(state.basis, small["kernel"], view)
        updates, state = step(small, state, params)
        np.testing.assert_allclose(updates["kernel"], expected, atol=1e-5)
        seeds.append(int(state.basis))
    assert len(set(seeds)) == 1
    _, state = step({"kernel": jnp.ones((6, 9))}, state, params)
    assert int(state.basis) != seeds[0]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["dct", "random"])
def test_a_virtual_adapter_trains_the_weight(rule: str) -> None:
    """The gradient of ``y = x W + x P B`` in ``B`` at zero is ``Pᵀ dW``: no ``dW`` is needed."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs, targets = (jax.random.normal(k, (16, d)) for k, d in zip(keys, (6, 9), strict=False))
    params = {"kernel": 0.1 * jax.random.normal(keys[2], (6, 9))}
    view = lro.View.of(params["kernel"], -2, 2)
    loss_of = lambda y: jnp.mean((y - targets) ** 2)
    whole_gradient = jax.grad(lambda p: loss_of(inputs @ p["kernel"]))
    tx = _projected(rule, refresh_every=100)
    start = jax.jit(whole_gradient)(params)

    def slot_gradient(params: Any, state: Any) -> Any:
        basis = state.basis if rule == "random" else state.basis["kernel"]

        def loss(slot: jax.Array) -> jax.Array:
            y = inputs @ params["kernel"] + inputs @ RULES[rule].lift(basis, slot, view)
            return loss_of(y)

        return {"kernel": jax.grad(loss)(jnp.zeros(view.projected_shape))}

    def trained(gradient_of: Callable[[Any, Any], Any]) -> Any:
        @jax.jit
        def step(now: Any, state: Any) -> Any:
            updates, state = tx.update(gradient_of(now, state), state, now)
            return moved_by(now, updates), state

        moved_by = lambda now, updates: jax.tree.map(lambda w, u: w - 0.05 * u, now, updates)
        updates, state = first(tx, start, params)
        now = moved_by(params, updates)
        for _ in range(3):
            now, state = step(now, state)
        return now

    seen = trained(slot_gradient)
    expected = trained(lambda now, state: whole_gradient(now))
    chex.assert_trees_all_close(seen, expected, atol=1e-5)


@pytest.mark.slow
def test_a_recipe_takes_projected_gradients_of_stacked_layers_beside_whole_ones() -> None:
    params = {"stack": jnp.ones((2, 6, 9)), "kernel": jnp.ones((6, 9)), "bias": jnp.ones(9)}
    keys = dict(zip(params, jax.random.split(jax.random.key(0), 3), strict=True))
    gradient = {name: jax.random.normal(keys[name], x.shape) for name, x in params.items()}
    spec = lro.WeightDimensionNumbers(-2, -1)
    specs = {"stack": spec, "kernel": spec, "bias": None}
    tx = lro.galore(0.1, 2, 5, subspace=RULES["svd"], weight_dimension_numbers=specs)
    step = jax.jit(tx.update)
    _, state = step(gradient, tx.init(params), params)
    view = lro.View.of(params["stack"], -2, 2)
    small = RULES["svd"].project(state[0].basis["stack"], gradient["stack"], view)
    assert small.shape == (2, 2, 9)
    one, _ = step(gradient, state, params)
    other, _ = step({**gradient, "stack": small}, state, params)
    chex.assert_trees_all_close(one, other, atol=1e-5)


def test_they_accumulate_like_whole_ones() -> None:
    gradients, params = normal_gradients((6, 9), 4), {"kernel": jnp.ones((6, 9))}
    tx = _projected("svd", accumulate_steps=2)
    whole = run(tx, params, gradients)
    state, step = whole[1][1], jax.jit(tx.update)
    params = whole[1][0]
    for gradient in gradients[2:]:
        updates, state = step(_by_the_state("svd", state, gradient, "rows"), state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(params, whole[-1][0], atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 9), (6, 2), (9, 6)])
def test_another_shape_is_refused(shape: tuple[int, int]) -> None:
    params = {"kernel": jnp.ones((6, 9))}
    tx = _projected("svd")
    with pytest.raises(ValueError, match=r"gradient of 'kernel' has the shape .*nor \(2, 9\)"):
        tx.update({"kernel": jnp.ones(shape)}, tx.init(params), params)


@pytest.mark.parametrize("residual", ["fira", "gradient_scaling", "error_feedback"])
def test_a_residual_rule_that_needs_whole_gradients_refuses_them(residual: Any) -> None:
    params = {"kernel": jnp.ones((6, 9))}
    tx = _projected("svd", residual=residual)
    with pytest.raises(ValueError, match=r"'kernel' arrived projected.*needs it whole"):
        tx.update({"kernel": jnp.ones((2, 9))}, tx.init(params), params)
