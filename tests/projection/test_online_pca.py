"""A trained basis: its gradient in closed form, where it rests, and what leaves it alone."""

import functools
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.projection.subspaces.following import pca_gradient
from tests.projection.rules import AXES, Case, decaying, normal
from tests.projection.runs import first, run


def _loss(basis: jax.Array, gradient: jax.Array, penalty: float) -> jax.Array:
    """The loss of the paper, of rows."""
    a = gradient / jnp.linalg.norm(gradient)
    gram = basis.T @ basis
    return jnp.sum((basis @ basis.T @ a - a) ** 2) + penalty * jnp.sum(
        (gram - jnp.eye(gram.shape[0])) ** 2
    )


_gradient = jax.jit(jax.grad(_loss))
_closed_form = jax.jit(pca_gradient, static_argnums=4)


def _case(gradient: jax.Array, rank: int, **options: Any) -> Case:
    rule = lro.subspaces.online_pca(rank, **options)
    return Case(rule, lro.View.of(gradient, -2, rank))


@functools.cache
def _track_of(one: Case) -> Any:
    rule, view = one.rule, one.view
    return jax.jit(lambda b, g: rule.track(b, g, rule.project(b, g, view), view))


def _tracked(one: Case, basis: Any, gradient: jax.Array, steps: int) -> list[Any]:
    bases, track = [], _track_of(one)
    for _ in range(steps):
        basis = track(basis, gradient)
        bases.append(basis)
    return bases


@AXES
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_the_closed_form_is_the_gradient_of_the_loss(axis: int, penalty: float) -> None:
    rng = np.random.default_rng(0)
    gradient, basis = rng.normal(size=(7, 5)), rng.normal(size=(7, 3))
    matrix = gradient if axis == -2 else gradient.T
    view = lro.View.of(matrix, axis, 3)
    projected = basis.T @ gradient if axis == -2 else gradient.T @ basis
    with jax.enable_x64(True):
        expected = _gradient(basis, gradient, penalty)
        got = _closed_form(basis, matrix, projected, penalty, view)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected, atol=1e-13)


def test_the_closed_form_of_a_stack_is_that_of_each_layer() -> None:
    stack, basis = np.asarray(normal(3, 7, 5)), np.asarray(normal(3, 7, 2, seed=1))
    view = lro.View.of(stack, -2, 2)
    projected = basis.swapaxes(-1, -2) @ stack
    expected = jax.vmap(_gradient, (0, 0, None))(basis, stack, 0.1)
    assert_close(_closed_form(basis, stack, projected, 0.1, view), expected, 100)


def test_an_orthonormal_basis_loses_what_it_does_not_capture_and_moves_at_right_angles() -> None:
    gradient = np.asarray(normal(7, 9))
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(7, 3)))[0].astype(np.float32)
    projected = basis.T @ gradient
    captured = np.sum(projected**2) / np.sum(gradient**2)
    np.testing.assert_allclose(jax.jit(_loss)(basis, gradient, 0.1), 1 - captured, atol=1e-5)
    assert 0 <= captured <= 1
    descent = _closed_form(basis, gradient, projected, 0.1, lro.View.of(gradient, -2, 3))
    np.testing.assert_allclose(basis.T @ np.asarray(descent), np.zeros((3, 3)), atol=1e-5)


def test_it_descends_to_the_leading_singular_vectors_of_a_constant_gradient() -> None:
    gradient = np.diag(np.array([3.0, 2.0, 0.5, 0.2], np.float32))
    one = _case(gradient, 2, optimizer=optax.sgd(0.2))
    start = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(4, 2)))[0], jnp.float32)
    basis = one.rule.init(one.view)._replace(basis=start)
    bases = [one.dense(b) for b in _tracked(one, basis, gradient, 150)]
    losses = np.array([jax.jit(_loss)(b, gradient, 0.1) for b in bases[::10]])
    assert (np.diff(losses) < 1e-5).all()
    assert losses[0] > 2 * losses[-1]
    np.testing.assert_allclose(bases[-1] @ bases[-1].T, np.diag([1, 1, 0, 0]), atol=1e-3)
    np.testing.assert_allclose(bases[-1].T @ bases[-1], np.eye(2), atol=1e-3)


def test_the_exact_singular_vectors_stay_where_they_are() -> None:
    gradient = decaying(7, 9)
    one = _case(gradient, 3, optimizer=optax.sgd(0.1), initial=lro.subspaces.svd(3))
    first = one.found(gradient)
    last = _tracked(one, first, gradient, 5)[-1]
    np.testing.assert_allclose(last.basis, first.basis, atol=1e-4)


def test_without_a_rate_it_is_galore_that_never_refreshes() -> None:
    gradients = [{"kernel": normal(6, 8, seed=seed)} for seed in range(4)]
    ours = lro.online_subspace_descent(0.1, 3, subspace_learning_rate=0.0)
    theirs = lro.galore(0.1, 3, refresh_every=None)
    mine, other = (run(tx, gradients[0], gradients) for tx in (ours, theirs))
    for (one, _), (two, _) in zip(mine, other, strict=True):
        np.testing.assert_allclose(one["kernel"], two["kernel"], atol=1e-5)


def test_the_basis_moves_after_every_step_but_the_first() -> None:
    gradients = [{"kernel": normal(6, 8, seed=seed)} for seed in range(3)]
    tx = lro.scale_by_projection(optax.identity(), lro.subspaces.online_pca(3), refresh_every=None)
    state, step, bases = tx.init(gradients[0]), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = step(gradient, state)
        bases.append(np.asarray(state.basis.basis["kernel"]))
    found = lro.subspaces.online_pca(3, optax.set_to_zero())
    frozen = lro.scale_by_projection(optax.identity(), found, refresh_every=None)
    start = first(frozen, gradients[0])[1].basis.basis["kernel"]
    np.testing.assert_allclose(bases[0], start, atol=1e-5)
    assert (bases[1] != bases[0]).any()
    assert (bases[2] != bases[1]).any()
    # The update is made with the basis from before it moved.
    expected = bases[1] @ (bases[1].T @ np.asarray(gradients[2]["kernel"]))
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-5)


def test_a_gradient_that_is_zero_or_not_finite_leaves_it_alone() -> None:
    stack = np.asarray(normal(2, 6, 8))
    one = _case(stack, 3)
    basis = _tracked(one, one.found(stack), stack, 1)[0]
    for bad in (0.0, np.nan, np.inf):
        broken = np.stack([np.full_like(stack[0], bad), stack[1]])
        moved = jax.tree.map(np.asarray, _tracked(one, basis, broken, 1)[0])
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(moved))
        np.testing.assert_array_equal(moved.basis[0], basis.basis[0])
        assert (moved.basis[1] != basis.basis[1]).any()


def test_before_the_first_gradient_there_is_nothing_to_track() -> None:
    gradient = normal(6, 8)
    one = _case(gradient, 3)
    start = one.rule.init(one.view)
    jax.tree.map(np.testing.assert_array_equal, _tracked(one, start, gradient, 1)[0], start)
