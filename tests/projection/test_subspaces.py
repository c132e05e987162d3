"""Subspace rules: what every one of them must satisfy."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.projection.subspaces import base
from tests.projection.rules import (
    AXES,
    EVERY_RULE,
    FIND_FROM_GRADIENT,
    RULES,
    Case,
    case,
    case_of_both,
    decaying,
    gram_error,
    normal,
)

# One rule for each way in which a basis is kept and turned.
KINDS = pytest.mark.parametrize("name", ["svd", "online_pca", "dct", "gaussian", "adaptive_rank"])
SQUARED = pytest.mark.parametrize("squared", [False, True], ids=["C", "C∘C"])
STACK = (2, 6, 8)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(RULES)),
    axis=st.sampled_from([-2, -1]),
    batch=st.sampled_from([(), (2,), (1, 2)]),
    rows=st.sampled_from([1, 4, 7]),
    columns=st.sampled_from([1, 4, 7]),
    rank=st.sampled_from([1, 3, 9]),
)
def test_lift_is_the_exact_adjoint_of_project_in_any_shape(
    name: str, axis: int, batch: tuple[int, ...], rows: int, columns: int, rank: int
) -> None:
    gradient = normal(*batch, rows, columns, seed=rows * 7 + columns)
    one = case(name, gradient.shape, axis, rank)
    assert one.view.rank == min(rank, rows, columns)
    _assert_adjoint(one, one.found(gradient), gradient)


@EVERY_RULE
@AXES
def test_lift_is_the_exact_adjoint_of_project(name: str, axis: int) -> None:
    gradient = normal(*STACK)
    one = case(name, STACK, axis)
    basis = one.found(gradient)
    _assert_adjoint(one, basis, gradient)
    if one.rule.orthonormal:
        assert gram_error(one.dense(basis), _active(name, basis)) < 1e-5


def _active(name: str, basis: Any) -> Any:
    return basis.rank if name == "adaptive_rank" else None


def _assert_adjoint(one: Case, basis: Any, gradient: jax.Array) -> None:
    """``<project(G), X> = <G, lift(X)>`` up to rounding of the sums."""
    projected = one.project(basis, gradient)
    assert projected.shape == one.view.projected_shape
    x = normal(*projected.shape, seed=1)
    lifted = one.lift(basis, x)
    assert lifted.shape == gradient.shape
    dot = lambda a, b: float(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)))
    size = np.sqrt(dot(gradient, gradient) * dot(lifted, lifted))
    assert abs(dot(projected, x) - dot(gradient, lifted)) <= 1e-6 * size


@KINDS
def test_lift_is_the_exact_adjoint_of_project_on_both_sides(name: str) -> None:
    gradient = normal(2, 6, 6)
    one = case_of_both(name, gradient.shape)
    _assert_adjoint(one, one.found(gradient), gradient)


@KINDS
@AXES
def test_projecting_the_identity_is_lifting_it_transposed(name: str, axis: int) -> None:
    gradient = decaying(6, 8)
    one = case(name, gradient.shape, axis)
    basis, length = one.found(gradient), one.view.length
    square = one.view._replace(shape=(length, length))
    projected = one.rule.project(basis, jnp.eye(length), square)
    dense = one.dense(basis)
    np.testing.assert_allclose(projected, dense.T if axis == -2 else dense, atol=1e-6)


@EVERY_RULE
def test_a_basis_found_from_bfloat16_gradients_is_float32_and_orthonormal(name: str) -> None:
    gradient = normal(*STACK).astype(jnp.bfloat16)
    one = case(name, STACK, -1)
    basis = one.found(gradient)
    again = one.refresh(jax.random.key(1), gradient[::-1], basis)
    for kept in (basis, again):
        matrix = one.dense(kept)
        assert matrix.dtype == np.float32
        assert one.project(kept, gradient).dtype == jnp.float32
        if one.rule.orthonormal:
            assert gram_error(matrix, _active(name, kept)) < 1e-5


@EVERY_RULE
def test_a_stack_equals_each_layer(name: str) -> None:
    stack = jnp.stack([decaying(6, 8, 2.0, seed) for seed in range(2)])
    many, one = case(name, STACK), case(name, STACK[1:])
    whole = many.found(stack)
    projected = many.project(whole, stack)
    for i, gradient in enumerate(stack):
        own = one.found(gradient)
        np.testing.assert_allclose(many.dense(whole)[i], one.dense(own), atol=1e-4)
        np.testing.assert_allclose(projected[i], one.project(own, gradient), atol=1e-4)


@EVERY_RULE
def test_rows_of_a_matrix_are_columns_of_its_transpose(name: str) -> None:
    gradient = decaying(6, 8, 2.0)
    rows, columns = case(name, (6, 8), -2), case(name, (8, 6), -1)
    one, other = rows.found(gradient), columns.found(gradient.T)
    # Signs of the first singular vectors are LAPACK's: so their projectors are compared.
    projector = lambda p: p @ p.T
    np.testing.assert_allclose(
        projector(rows.dense(one)), projector(columns.dense(other)), atol=1e-4
    )
    np.testing.assert_allclose(
        rows.lift(one, rows.project(one, gradient)),
        columns.lift(other, columns.project(other, gradient.T)).T,
        atol=1e-4,
    )


@KINDS
@AXES
@SQUARED
def test_turn_equals_the_dense_product(name: str, axis: int, squared: bool) -> None:
    one = case(name, STACK, axis)
    old, new = one.found(normal(*STACK)), one.found(normal(*STACK, seed=1), seed=1)
    x = normal(*one.view.projected_shape, seed=2)
    between = _between(one.dense(old), one.dense(new), squared)
    expected = between @ x if axis == -2 else x @ between.swapaxes(-1, -2)
    np.testing.assert_allclose(one.turn(old, new, x, squared), expected, atol=1e-5)


@KINDS
@SQUARED
def test_turn_equals_the_dense_products_on_both_sides(name: str, squared: bool) -> None:
    shape = (2, 6, 6)
    both, sides = case_of_both(name, shape), [case(name, shape, axis) for axis in (-2, -1)]
    old, new = both.found(normal(*shape)), both.found(normal(*shape, seed=1), seed=1)
    x = normal(2, 3, 3, seed=2)
    rows, columns = (
        _between(side.dense(old[i]), side.dense(new[i]), squared) for i, side in enumerate(sides)
    )
    expected = rows @ x @ columns.swapaxes(-1, -2)
    np.testing.assert_allclose(both.turn(old, new, x, squared), expected, atol=1e-5)


def _between(old: np.ndarray, new: np.ndarray, squared: bool) -> np.ndarray:
    """``C = newᵀ old`` or its entries squared, in float64."""
    between = new.swapaxes(-1, -2).astype(np.float64) @ old
    return between**2 if squared else between


@pytest.mark.parametrize("name", ["svd", "dct", "orthonormal", "adaptive_rank"])
@AXES
def test_turning_to_the_same_orthonormal_basis_is_the_identity(name: str, axis: int) -> None:
    gradient = normal(*STACK)
    one = case(name, STACK, axis)
    assert one.rule.orthonormal
    basis = one.found(gradient)
    projected = one.project(basis, gradient)
    np.testing.assert_allclose(one.turn(basis, basis, projected), projected, atol=1e-5)


def test_captured_energy_is_a_share_and_better_rules_capture_more_on_average() -> None:
    gradients = [decaying(16, 24, 1.0, seed) for seed in range(4)]
    mean = {}
    for name in ("svd", "randomized_svd", "power_iteration", "dct", "orthonormal"):
        one = case(name, (16, 24), -2, 4)
        energy = lambda g, seed, one=one: jnp.sum(one.project(one.found(g, seed), g) ** 2)
        shares = [float(energy(g, i) / jnp.sum(g**2)) for i, g in enumerate(gradients)]
        assert min(shares) >= 0
        assert max(shares) <= 1
        mean[name] = np.mean(shares)
    assert mean["svd"] + 1e-6 >= mean["randomized_svd"] > mean["dct"] > mean["orthonormal"]
    assert mean["svd"] + 1e-6 >= mean["power_iteration"] > mean["orthonormal"]


@pytest.mark.parametrize("name", [*FIND_FROM_GRADIENT, "adaptive_rank", "dct"])
@pytest.mark.parametrize("size", [1e-30, 1e18])
def test_a_basis_does_not_depend_on_the_size_of_the_gradient(name: str, size: float) -> None:
    gradient = decaying(6, 8)
    one = case(name, gradient.shape)
    first, other = (one.dense(one.found(gradient * scale)) for scale in (1.0, size))
    np.testing.assert_allclose(first @ first.T, other @ other.T, atol=1e-4)


@pytest.mark.parametrize("name", FIND_FROM_GRADIENT)
def test_a_found_basis_agrees_in_sign_with_the_last(name: str) -> None:
    gradient = decaying(6, 8)
    one = case(name, gradient.shape)
    last = one.found(gradient)
    new = one.refresh(jax.random.key(1), 0.01 - gradient, last)
    assert (np.diag(one.dense(last).T @ one.dense(new)) > 0).all()


def test_signs_agree_for_each_matrix_of_a_stack() -> None:
    old = jnp.stack([jnp.eye(3, 2), -jnp.eye(3, 2)])
    np.testing.assert_array_equal(base.agreeing(jnp.stack([jnp.eye(3, 2)] * 2), old), old)
