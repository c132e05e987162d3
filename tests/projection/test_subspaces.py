"""Subspace rules: what any of them must satisfy, and how close the randomized one comes."""

import chex
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro

RULES = {"svd": lro.subspaces.svd, "randomized_svd": lro.subspaces.randomized_svd}
AXES = pytest.mark.parametrize("axis", [-2, -1], ids=["rows", "columns"])
EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def _basis(rule, gradient, axis):
    return rule.refresh(jax.random.key(0), gradient, rule.init(gradient, axis), axis)


def _decaying(rows, columns, power=1.0):
    """A matrix with singular values 1 / i**power."""
    rng, small = np.random.default_rng(0), min(rows, columns)
    u, _ = np.linalg.qr(rng.normal(size=(rows, small)))
    v, _ = np.linalg.qr(rng.normal(size=(columns, small)))
    return jnp.asarray((u / np.arange(1, small + 1) ** power) @ v.T, jnp.float32)


@EVERY_RULE
@AXES
@settings(max_examples=15, deadline=None)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    rank=st.integers(1, 8),
)
def test_basis_is_orthonormal_and_lift_is_the_adjoint_of_project(
    rule, axis, batch, rows, columns, rank
):
    rng = np.random.default_rng(rows * 7 + columns)
    gradient = jnp.asarray(rng.normal(size=(*batch, rows, columns)), jnp.float32)
    rule = rule(rank)
    basis = _basis(rule, gradient, axis)
    kept = min(rank, rows, columns)
    chex.assert_shape(basis, (*batch, gradient.shape[axis], kept))
    gram = np.einsum("...dr,...ds->...rs", basis, basis)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(kept), gram.shape), atol=1e-5)
    projected = rule.project(basis, gradient, axis)
    x = jnp.asarray(rng.normal(size=projected.shape), jnp.float32)
    np.testing.assert_allclose(
        jnp.vdot(projected, x), jnp.vdot(gradient, rule.lift(basis, x, axis)), rtol=1e-4, atol=1e-4
    )


@AXES
def test_svd_captures_the_leading_singular_values(axis):
    gradient = jax.random.normal(jax.random.key(1), (12, 9))
    rule = lro.subspaces.svd(4)
    captured = jnp.sum(rule.project(_basis(rule, gradient, axis), gradient, axis) ** 2)
    expected = (np.linalg.svd(np.asarray(gradient, np.float64))[1][:4] ** 2).sum()
    np.testing.assert_allclose(captured, expected, rtol=1e-5)


def test_randomized_svd_captures_what_the_specification_says():
    """Singular values 1/i, 768 × 2048, rank 128, 16 further columns: exact 0.9961 of the energy."""
    gradient = _decaying(768, 2048)
    total = jnp.sum(gradient**2)
    for power_iterations, expected in ((0, 0.9911), (1, 0.9958), (2, 0.99599)):
        rule = lro.subspaces.randomized_svd(128, 16, power_iterations)
        captured = jnp.sum(rule.project(_basis(rule, gradient, -2), gradient, -2) ** 2) / total
        np.testing.assert_allclose(captured, expected, atol=3e-4)
        assert captured < 0.99611


@AXES
def test_randomized_svd_is_exact_when_the_sketch_spans_the_matrix(axis):
    gradient = jax.random.normal(jax.random.key(1), (10, 7))
    exact, randomized = (_basis(rule(3), gradient, axis) for rule in RULES.values())
    np.testing.assert_allclose(exact @ exact.T, randomized @ randomized.T, atol=1e-4)


@AXES
def test_randomized_svd_orders_its_vectors_as_the_exact_one(axis):
    gradient = _decaying(40, 60, power=2.0)
    exact, randomized = (_basis(rule(4), gradient, axis) for rule in RULES.values())
    np.testing.assert_allclose(jnp.abs(jnp.diag(exact.T @ randomized)), np.ones(4), atol=1e-3)


@EVERY_RULE
@pytest.mark.parametrize("size", [1e-30, 1e18])
def test_basis_does_not_depend_on_the_size_of_the_gradient(rule, size):
    gradient = _decaying(12, 20)
    one, other = (_basis(rule(3), gradient * scale, -2) for scale in (1.0, size))
    np.testing.assert_allclose(one @ one.T, other @ other.T, atol=1e-4)


def test_randomized_svd_of_a_stack_equals_that_of_each_layer():
    stack = jax.random.normal(jax.random.key(2), (3, 30, 40))
    rule = lro.subspaces.randomized_svd(4)
    each = jnp.stack([_basis(rule, gradient, -2) for gradient in stack])
    np.testing.assert_allclose(_basis(rule, stack, -2), each, atol=1e-4)


def test_rows_of_a_matrix_are_columns_of_its_transpose():
    gradient = _decaying(12, 20, power=2.0)
    for rule in (rule(3) for rule in RULES.values()):
        rows, columns = _basis(rule, gradient, -2), _basis(rule, gradient.T, -1)
        np.testing.assert_allclose(rows @ rows.T, columns @ columns.T, atol=1e-4)


@EVERY_RULE
@pytest.mark.parametrize(
    ("rank", "error"), [(0, ValueError), (-1, ValueError), (True, ValueError), (0.5, TypeError)]
)
def test_a_rank_that_is_none_is_refused_by_name(rule, rank, error):
    with pytest.raises(error, match="rank="):
        rule(rank)


@EVERY_RULE
def test_a_traced_rank_is_refused_with_the_remedy(rule):
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(lambda rank: rule(rank).init(jnp.ones((3, 3)), -2))(2)


@pytest.mark.parametrize("name", ["oversample", "power_iterations"])
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_bad_options_of_the_randomized_svd_are_refused_by_name(name, value, error):
    with pytest.raises(error, match=name):
        lro.subspaces.randomized_svd(2, **{name: value})
