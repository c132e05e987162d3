"""Subspace rules: what every one of them must satisfy."""

from typing import Any

from close import assert_close
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
    First,
    case,
    case_of_both,
    decaying,
    gram_error,
    normal,
)

# One rule for each way in which a basis is kept and turned.
KINDS = pytest.mark.parametrize("name", ["svd", "online_pca", "dct", "gaussian", "adaptive_rank"])
STACK = (2, 6, 8)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True)
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
    _assert_adjoint(one, gradient)


@pytest.mark.combinations(1)
@EVERY_RULE
@AXES
def test_lift_is_the_exact_adjoint_of_project(name: str, axis: int) -> None:
    gradient = normal(*STACK)
    one = case(name, gradient.shape, axis)
    found = _assert_adjoint(one, gradient)
    if one.rule.orthonormal:
        assert gram_error(found.dense, _active(name, found.basis)) < 1e-5


def _active(name: str, basis: Any) -> Any:
    return basis.rank if name == "adaptive_rank" else None


def _assert_adjoint(one: Case, gradient: jax.Array) -> First:
    """``<project(G), X> = <G, lift(X)>`` up to rounding of the sums."""
    x = normal(*one.view.projected_shape, seed=1)
    found = one.first(gradient, x)
    assert found.projected.shape == one.view.projected_shape
    assert found.lifted.shape == gradient.shape
    dot = lambda a, b: float(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)))
    size = np.sqrt(dot(gradient, gradient) * dot(found.lifted, found.lifted))
    assert abs(dot(found.projected, x) - dot(gradient, found.lifted)) <= 5e-6 * size
    return found


@KINDS
def test_lift_is_the_exact_adjoint_of_project_on_both_sides(name: str) -> None:
    gradient = normal(2, 6, 6)
    one = case_of_both(name, gradient.shape)
    _assert_adjoint(one, gradient)


@KINDS
@AXES
def test_projecting_the_identity_is_lifting_it_transposed(name: str, axis: int) -> None:
    gradient = decaying(*((6, 8) if axis == -2 else (8, 6)))
    one = case(name, gradient.shape, axis)
    basis, *_, dense = one.first(gradient)
    square = one.view._replace(shape=(6, 6))
    project = jax.jit(lambda basis, x: one.rule.project(basis, x, square))
    projected = np.asarray(project(basis, np.eye(6, dtype=np.float32)))
    np.testing.assert_allclose(projected, dense.T if axis == -2 else dense, atol=1e-5)


@EVERY_RULE
def test_a_basis_found_from_bfloat16_gradients_is_float32_and_orthonormal(name: str) -> None:
    gradient = normal(*STACK).astype(jnp.bfloat16)
    one = case(name, STACK, -1)
    found = one.first(gradient)
    again = one.first(np.asarray(gradient)[::-1], seed=1, last=found.basis)
    for kept in (found, again):
        assert kept.dense.dtype == kept.projected.dtype == np.float32
        if one.rule.orthonormal:
            assert gram_error(kept.dense, _active(name, kept.basis)) < 1e-5


@EVERY_RULE
def test_a_stack_equals_each_layer(name: str) -> None:
    stack = np.stack([decaying(6, 8, 2.0, seed) for seed in range(2)])
    many, one = case(name, STACK), case(name, STACK[1:])
    x = normal(*many.view.projected_shape, seed=1)
    whole = many.first(stack, x)
    for i, gradient in enumerate(stack):
        own = one.first(gradient, x[i])
        for together, alone in zip(whole[1:], own[1:], strict=True):
            np.testing.assert_allclose(together[i], alone, atol=1e-4)


@EVERY_RULE
def test_rows_of_a_matrix_are_columns_of_its_transpose(name: str) -> None:
    gradient = decaying(6, 8, 2.0)
    rows, columns = case(name, (6, 8), -2), case(name, (8, 6), -1)
    # Signs of the first singular vectors are LAPACK's: so what is lifted again is compared.
    one, other = rows.first(gradient), columns.first(np.asarray(gradient).T)
    np.testing.assert_allclose(one.captured, other.captured.T, atol=1e-4)


@KINDS
@AXES
def test_turn_equals_the_dense_product(name: str, axis: int) -> None:
    one = case(name, STACK, axis)
    old, new = one.first(normal(*STACK)), one.first(normal(*STACK, seed=1), seed=1)
    x = np.asarray(normal(*one.view.projected_shape, seed=2))
    for squared, turned in one.turned(old.basis, new.basis, x).items():
        between = _between(old.dense, new.dense, squared)
        expected = between @ x if axis == -2 else x @ between.swapaxes(-1, -2)
        assert_close(turned, expected, 100, dtype=np.float32)


@KINDS
def test_turn_equals_the_dense_products_on_both_sides(name: str) -> None:
    shape = (2, 6, 6)
    both, sides = case_of_both(name, shape), [case(name, shape, axis) for axis in (-2, -1)]
    old, new = (both.first(normal(*shape, seed=i), seed=i).basis for i in (0, 1))
    x = np.asarray(normal(2, 3, 3, seed=2))
    dense = [(side.dense(old[i]), side.dense(new[i])) for i, side in enumerate(sides)]
    for squared, turned in both.turned(old, new, x).items():
        rows, columns = (_between(*bases, squared) for bases in dense)
        expected = rows @ x @ columns.swapaxes(-1, -2)
        assert_close(turned, expected, 100, dtype=np.float32)


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
    basis, projected, *_ = one.first(gradient)
    turned = one.turned(basis, basis, projected)[False]
    np.testing.assert_allclose(turned, projected, atol=1e-5)


@pytest.mark.slow
def test_captured_energy_is_a_share_and_better_rules_capture_more_on_average() -> None:
    gradients = [decaying(16, 24, 1.0, seed) for seed in range(4)]
    mean = {}
    for name in ("svd", "randomized_svd", "power_iteration", "dct", "orthonormal"):
        one = case(name, (16, 24), -2, 4)
        captured = [one.first(g, seed=i).captured for i, g in enumerate(gradients)]
        share = lambda g, kept: np.vdot(g, kept) / np.vdot(g, g)
        shares = [share(np.asarray(g), kept) for g, kept in zip(gradients, captured, strict=True)]
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
    gradient = np.asarray(gradient)
    first, other = (one.first(gradient * np.float32(x)).dense for x in (1.0, size))
    np.testing.assert_allclose(first @ first.T, other @ other.T, atol=1e-4)


@pytest.mark.parametrize("name", FIND_FROM_GRADIENT)
def test_a_found_basis_agrees_in_sign_with_the_last(name: str) -> None:
    gradient = decaying(6, 8)
    one = case(name, gradient.shape)
    last = one.first(gradient)
    new = one.first(np.float32(0.01) - np.asarray(gradient), seed=1, last=last.basis)
    assert (np.diag(last.dense.T @ new.dense) > 0).all()


def test_signs_agree_for_each_matrix_of_a_stack() -> None:
    old = np.stack([np.eye(3, 2, dtype=np.float32), -np.eye(3, 2, dtype=np.float32)])
    np.testing.assert_array_equal(jax.jit(base.agreeing)(np.abs(old), old), old)
