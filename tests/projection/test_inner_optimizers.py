"""Any optax transformation inside the projection, and what is asked of it."""

from collections.abc import Callable
from typing import Any

import chex
from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.projection.runs import first, normal_gradients, orthonormal, run

SHAPE = (8, 12)
BASIS = orthonormal(8, 4)
INNER: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "lamb": lambda: optax.lamb(0.1, weight_decay=0.1),
    "lion": lambda: optax.lion(0.1, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2, weight_decay_rate=0.1),
    "muon": lambda: optax.contrib.muon(0.1, weight_decay=0.1),
    "ademamix": lambda: optax.contrib.ademamix(0.1, weight_decay=0.1),
    "sgd_nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
}
NEED_PARAMETERS = ["adamw", "lamb", "lion", "adafactor", "muon", "ademamix"]
EVERY_INNER = pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.full] if x == "ademamix" else []) for x in INNER]
)


def _projected(inner: Any, **options: Any) -> Any:
    options = {"side": "rows", **options}
    return lro.scale_by_projection(inner, lro.subspaces.fixed(BASIS), **options)


def _params() -> dict[str, jax.Array]:
    one, two = jax.random.split(jax.random.key(7))
    return {"kernel": jax.random.normal(one, SHAPE), "bias": jax.random.normal(two, (12,))}


def _with_bias(gradients: list[Any]) -> list[Any]:
    return [{**g, "bias": g["kernel"][0]} for g in gradients]


@EVERY_INNER
def test_any_optimizer_sees_the_projected_gradient_and_the_projected_weight(name: str) -> None:
    inner, params = INNER[name](), _params()
    tx = _projected(inner)
    project = lambda tree: {**tree, "kernel": BASIS.T @ tree["kernel"]}

    @jax.jit
    def step(gradient: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def expected_step(gradient: Any, state: Any, params: Any) -> Any:
        updates, state = inner.update(project(gradient), state, project(params))
        lifted = {**updates, "kernel": BASIS @ updates["kernel"]}
        return optax.apply_updates(params, lifted), state

    expected, state, inner_state = params, tx.init(params), inner.init(project(params))
    for gradient in _with_bias(normal_gradients(SHAPE, 4)):
        params, state = step(gradient, state, params)
        expected, inner_state = expected_step(gradient, inner_state, expected)
    chex.assert_trees_all_close(params, expected, atol=2e-5)


@pytest.mark.parametrize("name", NEED_PARAMETERS)
def test_parameters_that_an_optimizer_needs_and_does_not_get_are_asked_for(name: str) -> None:
    params = _params()
    tx = _projected(INNER[name]())
    with pytest.raises(ValueError, match=r"requires? .*param"):
        jax.eval_shape(lambda gradients: tx.update(gradients, tx.init(params)), params)


@pytest.mark.parametrize("name", ["adamw", "lion", "ademamix", "muon"])
def test_moments_of_many_optimizers_can_be_rotated(name: str) -> None:
    params, gradients = _params(), _with_bias(normal_gradients(SHAPE, 3))
    others = optax.adam(0.1)
    kept, rotated = (
        _projected(INNER[name](), on_refresh=how, refresh_every=2, non_matrix_transform=others)
        for how in ("keep", "rotate_moments")
    )
    one, other = (run(tx, params, gradients)[-1][0] for tx in (kept, rotated))
    chex.assert_trees_all_close(one, other, atol=1e-4)  # the basis did not turn


@EVERY_INNER
def test_any_optimizer_can_be_reset(name: str) -> None:
    params, gradients = _params(), _with_bias(normal_gradients(SHAPE, 3))
    options = {"refresh_every": 2, "non_matrix_transform": optax.adam(0.1)}
    tx = _projected(INNER[name](), on_refresh="reset", **options)
    (_, _), (middle, _), (last, _) = run(tx, params, gradients)
    again = run(tx, middle, gradients[2:])[-1][0]
    np.testing.assert_allclose(last["kernel"], again["kernel"], atol=1e-5)


@pytest.mark.parametrize("on_refresh", ["keep", "rotate_moments"])
def test_other_leaves_get_the_transformation_given_for_them(on_refresh: Any) -> None:
    params, gradients = _params(), _with_bias(normal_gradients(SHAPE, 3))
    options = {"scale": 0.5, "on_refresh": on_refresh}
    tx = _projected(optax.scale_by_adam(), non_matrix_transform=optax.adamw(0.3), **options)
    alone = _projected(optax.scale_by_adam(), **options)
    seen, kernel = (run(t, params, gradients)[-1][0] for t in (tx, alone))
    bias = run(optax.adamw(0.3), params, gradients)[-1][0]["bias"]
    np.testing.assert_allclose(seen["bias"], bias, atol=1e-6)
    np.testing.assert_allclose(seen["kernel"], kernel["kernel"], atol=1e-5)


def test_the_state_of_other_leaves_is_theirs_alone() -> None:
    params = _params()
    state = _projected(optax.scale_by_adam(), non_matrix_transform=optax.trace(0.9)).init(params)
    assert isinstance(state.inner.mu["bias"], optax.MaskedNode)
    assert isinstance(state.non_matrix_transform.trace["kernel"], optax.MaskedNode)
    assert state.inner.mu["kernel"].shape == (4, 12)
    assert state.non_matrix_transform.trace["bias"].shape == (12,)


def test_an_optimizer_whose_state_differs_from_leaf_to_leaf_needs_another_for_the_rest() -> None:
    params = _params()
    tx = _projected(optax.contrib.muon(0.1), on_refresh="reset")
    with pytest.raises(ValueError, match="give non_matrix_transform="):
        tx.init(params)


def test_extra_arguments_reach_the_inner_optimizer() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, factor: float, **_: Any) -> Any:
        return jax.tree.map(lambda x: factor * x, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    gradient = {"kernel": BASIS @ jnp.ones((4, 12))}
    for on_refresh in ("keep", "reset"):
        tx = _projected(inner, on_refresh=on_refresh)
        seen, _ = tx.update(gradient, tx.init(gradient), factor=3.0)
        assert_close(seen["kernel"], 3 * gradient["kernel"], 100)


def test_ranks_go_by_path_fraction_or_function_through_a_recipe() -> None:
    params = {
        "attention": {"query": {"kernel": jnp.zeros((8, 8))}},
        "mlp": {"up": {"kernel": jnp.zeros((8, 32))}, "down": {"kernel": jnp.zeros((32, 8))}},
    }
    ranks = lambda rank: [
        basis.shape[-1]
        for basis in jax.tree.leaves(jax.eval_shape(lro.galore(0.1, rank).init, params)[0].basis)
    ]
    assert ranks({"query": 2, "mlp/up": 0.5, ".*": 100}) == [2, 8, 4]  # query, down, up
    assert ranks(0.25) == [2, 2, 2]
    assert ranks(lambda path, shape: 3 if "down" in path else shape[0] // 8) == [1, 3, 1]
    with pytest.raises(ValueError, match=r"no pattern for 'mlp/down/kernel'"):
        ranks({"query": 2, "up": 2})


def test_basis_moments_and_update_agree_with_the_rank_of_each_leaf() -> None:
    gradient = dict(zip("ab", normal_gradients((6, 9), 2), strict=True))
    tx = lro.galore(0.1, {"a": 1, "b": 3}, subspace=lro.subspaces.svd({"a": 1, "b": 3}))
    updates, state = first(tx, gradient)
    assert [x.shape[0] for x in jax.tree.leaves(state[0].inner.mu)] == [1, 3]
    found = [int(np.linalg.matrix_rank(u, tol=1e-4)) for u in jax.tree.leaves(updates)]
    assert found == [1, 3]


@pytest.mark.parametrize("on_refresh", ["keep", "reset", "rotate_moments"])
def test_other_leaves_have_their_own_transformation_whatever_becomes_of_the_moments(
    on_refresh: Any,
) -> None:
    params = {"kernel": jax.random.normal(jax.random.key(0), (6, 9)), "bias": jnp.ones(9)}
    tx = lro.scale_by_projection(
        optax.scale_by_adam(),
        lro.subspaces.svd(2),
        on_refresh=on_refresh,
        refresh_every=2,
        non_matrix_transform=optax.scale(3.0),
    )
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params)
    np.testing.assert_array_equal(updates["bias"], 3.0 * params["bias"])
    assert len(jax.tree.leaves(state.inner)) == 3
