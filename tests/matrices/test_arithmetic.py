"""Products of a bfloat16 matrix by parts: every platform's path, run here on the CPU."""

from close import assert_close
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import pytest

from lowrank_optax.matrices.arithmetic import (
    bfloat16_parts,
    product_by_parts,
    product_with_bfloat16,
)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e30])
def test_three_bfloat16_parts_add_up_to_the_float32_number(scale):
    x = jax.random.normal(jax.random.key(0), (1000,)) * scale
    parts = [np.asarray(part, np.float64) for part in jax.jit(bfloat16_parts)(x)]
    np.testing.assert_array_equal(sum(parts), np.asarray(x, np.float64))


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("multiply", [product_by_parts, product_with_bfloat16])
@pytest.mark.parametrize("letters", ["...mn,...nk->...mk", "...mn,...mk->...nk"])
def test_products_are_those_of_float64_up_to_float32_rounding(letters, multiply, batch):
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(*batch, 40, 40)), jnp.bfloat16)
    thin = jnp.asarray(rng.normal(size=(*batch, 40, 6)), jnp.float32)
    wide = [np.asarray(x, np.float64) for x in (matrix, thin)]
    exact, sizes = np.einsum(letters, *wide), np.einsum(letters, *map(np.abs, wide))
    got = jax.jit(multiply, static_argnums=0)(letters, matrix, thin)
    assert got.dtype == jnp.float32
    assert_close(got, exact, 8, size=sizes)


def test_what_is_not_finite_in_the_matrix_stays_in_its_row():
    matrix = jnp.ones((4, 5), jnp.bfloat16).at[1, 2].set(jnp.inf)
    got = product_by_parts("...mn,...nk->...mk", matrix, jnp.full((5, 3), 1 / 3))
    assert np.isfinite(got).all(axis=-1).tolist() == [True, False, True, True]


@pytest.mark.slow
def test_parts_go_where_the_whole_would_on_explicit_axes():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    matrix = jax.random.normal(jax.random.key(0), (8, 6)).astype(jnp.bfloat16)
    thin = jax.random.normal(jax.random.key(1), (6, 3))
    letters, rows = "...mn,...nk->...mk", PartitionSpec("x", None)
    expected = product_by_parts(letters, matrix, thin)
    with jax.set_mesh(mesh):
        matrix = jax.device_put(matrix, PartitionSpec("x", "y"))
        thin = jax.device_put(thin, PartitionSpec("y", None))
        for multiply in (product_by_parts, product_with_bfloat16):
            got = jax.jit(multiply, static_argnums=(0, 3))(letters, matrix, thin, rows)
            assert jax.typeof(got).sharding.spec == rows
            assert_close(got, expected)
