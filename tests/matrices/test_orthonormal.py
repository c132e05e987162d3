"""Orthonormal bases by products: every platform's path, run here on the CPU."""

import ast
from pathlib import Path
import re

from close import assert_close
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import pytest

from lowrank_optax.matrices import orthonormal


def _matrix(rows, singular_values, seed=0):
    rng = np.random.default_rng(seed)
    columns = len(singular_values)
    u, _ = np.linalg.qr(rng.normal(size=(rows, columns)))
    v, _ = np.linalg.qr(rng.normal(size=(columns, columns)))
    return (u * singular_values) @ v.T, u @ v.T


def _gram_error(q):
    q = np.asarray(q, np.float64)
    return np.abs(q.swapaxes(-1, -2) @ q - np.eye(q.shape[-1])).max()


@pytest.fixture
def few_columns(monkeypatch):
    """Blocks of seven columns, so that small matrices have several and the last is padded."""
    monkeypatch.setattr(orthonormal, "BLOCK_COLUMNS", 7)


# Where columns are left to rounding, how far from orthonormal depends on what it leaves.
@pytest.mark.parametrize(
    ("singular_values", "bound"),
    [
        (np.logspace(0, -5, 24), 1e-5),
        (np.r_[np.ones(10), np.zeros(14)], 2e-2),
        (np.r_[1e12, np.ones(23)], 2e-2),
        (np.zeros(24), 1e-5),
    ],
    ids=["ill-conditioned", "rank-deficient", "one huge", "zero"],
)
@pytest.mark.parametrize("rows", [24, 40])
def test_gram_schmidt_is_orthonormal_whatever_the_spectrum(
    few_columns, rows, singular_values, bound
):
    y, _ = _matrix(rows, singular_values)
    q = jax.jit(orthonormal.gram_schmidt)(jnp.asarray(y, jnp.float32))
    assert _gram_error(q) < bound


def test_gram_schmidt_keeps_the_span_of_a_deficient_matrix(few_columns):
    y, _ = _matrix(40, np.r_[np.ones(10), np.zeros(14)])
    q = np.asarray(jax.jit(orthonormal.gram_schmidt)(jnp.asarray(y, jnp.float32)), np.float64)
    np.testing.assert_allclose(q @ (q.T @ y), y, atol=1e-5)


def test_gram_schmidt_on_a_stack_equals_each(few_columns):
    stack = jax.random.normal(jax.random.key(0), (3, 20, 6))
    gram_schmidt = jax.jit(orthonormal.gram_schmidt)
    whole, each = gram_schmidt(stack), jnp.stack([gram_schmidt(y) for y in stack])
    np.testing.assert_allclose(whole, each, atol=1e-5)


def test_wide_sketches_are_orthonormal_on_the_cpu():
    y = jax.random.normal(jax.random.key(0), (400, 321))
    assert _gram_error(jax.jit(orthonormal.orthonormalize)(y)) < 1e-5


@pytest.mark.parametrize("size", [8, orthonormal.EIGH_COLUMNS + 8])
def test_leading_eigenvectors_are_in_descending_order(size):
    values = np.linspace(1, 0.1, size)
    vectors, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    gram = jnp.asarray((vectors * values) @ vectors.T, jnp.float32)
    got = np.asarray(orthonormal.leading_eigenvectors(gram, 5), np.float64)
    assert_close(np.diag(got.T @ gram @ got), values[:5], 100)


def test_orthogonal_iteration_finds_the_energy_of_the_exact_eigenvectors():
    values = 1 / np.arange(1, 65) ** 2
    vectors, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))
    gram = jnp.asarray((vectors * values) @ vectors.T, jnp.float32)
    got = jax.jit(orthonormal.orthogonal_iteration, static_argnums=1)(gram, 56)
    assert _gram_error(got) < 1e-5
    energy = np.trace(np.asarray(got).T @ np.asarray(gram) @ np.asarray(got))
    assert energy > (1 - 3e-4) * values[:56].sum()


def test_no_batch_of_factorizations_waits_for_the_threads_that_run_it() -> None:
    """Two batches at a time would wait for ever on a CPU of two cores."""
    x = jax.ShapeDtypeStruct((3, 8, 4), jnp.float32)
    gram = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    found = lambda a: orthonormal.leading_eigenvectors(a, 2)
    for function, arg in ((orthonormal.orthonormalize, x), (found, gram)):
        text = jax.jit(function).lower(arg).compile().as_text()
        calls = [line for line in text.splitlines() if 'custom_call_target="lapack' in line]
        assert calls
        assert not any("f32[3," in line for line in calls)


def test_in_turn_is_of_each_matrix_under_vmap_and_of_none() -> None:
    factorize = lambda x: jnp.linalg.qr(x)[0]
    in_turn = lambda x: orthonormal.in_turn(factorize, x)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 8, 4)), jnp.float32)
    assert_close(jax.jit(jax.vmap(jax.vmap(in_turn)))(x), factorize(x))
    assert_close(jax.jit(in_turn)(x), factorize(x))
    text = jax.jit(jax.vmap(in_turn)).lower(x).compile().as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="lapack' in line]
    assert calls
    assert not any("f32[2," in line or "f32[3," in line for line in calls)
    assert in_turn(jnp.ones((2, 0, 8, 4))).shape == (2, 0, 8, 4)
    assert in_turn(jnp.ones((2, 4, 0))).shape == (2, 4, 0)


def test_in_turn_takes_functions_with_defaults() -> None:
    x = jnp.diag(jnp.arange(3.0))
    assert_close(orthonormal.in_turn(jnp.linalg.eigvalsh, x), jnp.arange(3.0))


@pytest.mark.parametrize("of_devices", [("x",), (("x", "y"),), ()])
def test_in_turn_on_an_explicit_mesh_is_of_each_devices_matrices(of_devices: tuple) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6, 4)), jnp.float32)
    find = lambda x: orthonormal.leading_eigenvectors(orthonormal.gram_matrix(x), 2)
    expected = find(x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, PartitionSpec(*of_devices))
        program = jax.jit(find).lower(placed).compile()
        found = program(placed)
        assert_close(found, expected)
        assert jax.typeof(found).sharding.spec[0] == (of_devices or (None,))[0]
    calls = [line for line in program.as_text().splitlines() if "lapack" in line]
    assert calls
    assert not any(re.search(r"f32\[\d+,\d+,\d", line) for line in calls)


def test_factorizations_are_called_in_turn() -> None:
    """Each in the arguments of `in_turn`: elsewhere one of a batch could wait for ever."""
    called, found = set(), set()
    for path in Path(orthonormal.__file__).parents[1].rglob("*.py"):
        text = path.read_text()
        tree = ast.parse(text if "linalg" in text else "")
        for node in ast.walk(tree):
            if is_factorization(node):
                found.add((path.name, node.lineno, node.attr))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "in_turn":
                inside = [each for arg in node.args for each in ast.walk(arg)]
                called |= {(path.name, x.lineno, x.attr) for x in inside if is_factorization(x)}
    assert len(found) > 5
    assert found == called


def is_factorization(node: ast.AST) -> bool:
    """Whether it is ``jnp.linalg.NAME``, ``jax.lax.linalg.NAME`` or the like, but a norm."""
    if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute)):
        return False
    module = node.value
    is_numpy = isinstance(module.value, ast.Name) and module.value.id == "np"
    return module.attr == "linalg" and not is_numpy and node.attr != "norm"
