"""The input of a layer as adapters see it."""

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.adapters.operands import Lookup, Patches, Rows


def test_rows_multiply_in_their_own_dtype() -> None:
    x = jnp.ones((2, 3), jnp.bfloat16)
    product = Rows(x) @ jnp.full((3, 4), 0.5)
    assert product.dtype == jnp.bfloat16
    np.testing.assert_array_equal(product, np.full((2, 4), 1.5))


def test_a_float32_product_of_half_precision_is_not_rounded_to_it() -> None:
    rng = np.random.default_rng(0)
    x, matrix = (jnp.asarray(rng.normal(size=n), jnp.bfloat16) for n in ((5, 40), (40, 3)))
    exact = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
    product = Rows(x).float32_product(matrix)
    assert_close(product, exact)
    assert not np.array_equal(product, Rows(x) @ matrix)
    g = rng.normal(size=(5, 3)).astype(np.float32)
    slope = jax.grad(lambda x: jnp.sum(g * Rows(x).float32_product(matrix)))(x)
    assert slope.dtype == jnp.bfloat16
    expected = g @ np.asarray(matrix, np.float32).T
    assert_close(slope, expected, 4, size=np.abs(g) @ np.abs(matrix).T, dtype=jnp.bfloat16)
    rows = Lookup(jnp.array([2, 0]), jnp.dtype(jnp.bfloat16)).float32_product(jnp.eye(3))
    np.testing.assert_array_equal(rows, np.eye(3, dtype=np.float32)[[2, 0]])
    patches = Patches(x, lambda x, matrix: x @ matrix).float32_product(matrix)
    assert (rows.dtype, patches.dtype) == (jnp.float32, jnp.float32)
    assert_close(patches, exact, 4, dtype=jnp.bfloat16)
    with jax.enable_x64(True):
        assert Rows(jnp.ones((2, 3), jnp.float64)).float32_product(matrix[:3]).dtype == jnp.float64


def test_rows_of_experts_meet_the_matrices_of_their_experts() -> None:
    rng = np.random.default_rng(0)
    x, matrices = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 3, 4))
    expected = np.stack([x[e] @ matrices[e] for e in range(2)])
    assert_close(Rows(jnp.asarray(x)) @ jnp.asarray(matrices), expected, 100)


def test_lookup_is_the_product_with_one_hot_rows() -> None:
    table, index = jnp.arange(12.0).reshape(4, 3), jnp.array([[1, 3], [0, 1]])
    one_hot = jax.nn.one_hot(index, 4)
    assert_close(Lookup(index) @ table, one_hot @ table)
    assert (Lookup(index, jnp.dtype(jnp.bfloat16)) @ table).dtype == jnp.bfloat16


def test_nothing_is_dropped_of_row_numbers() -> None:
    lookup = Lookup(jnp.array([1, 2]))
    assert lookup.drop(jax.random.key(0), 0.9) is lookup


@pytest.mark.parametrize("kind", ["rows", "patches"])
def test_dropped_inputs_are_zero_or_scaled_up_and_keep_their_mean(kind: str) -> None:
    x, same = jnp.ones((64, 64)), lambda x, matrix: x @ matrix
    operand = Rows(x) if kind == "rows" else Patches(x, same)
    dropped = operand.drop(jax.random.key(1), 0.25) @ jnp.eye(64)
    values = np.unique(np.asarray(dropped))
    assert_close(values, [0, 4 / 3])
    # Of 4096 values, each of deviation 0.58: five standard errors.
    assert abs(float(dropped.mean()) - 1) < 5 * 0.58 / 64


def test_patches_multiply_by_what_they_are_told() -> None:
    called = []

    def convolve(x: jax.Array, matrix: jax.Array) -> jax.Array:
        called.append(matrix.dtype)
        return x @ matrix

    product = Patches(jnp.ones((2, 3), jnp.bfloat16), convolve) @ jnp.ones((3, 2))
    assert called == [jnp.bfloat16]
    assert product.shape == (2, 2)
