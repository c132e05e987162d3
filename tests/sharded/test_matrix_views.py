"""Matrix views of arrays on a mesh of explicit axes: the same numbers, the sharding kept."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from lowrank_optax.matrices import (
    WeightDimensionNumbers,
    from_matrix,
    matrix_partition,
    to_matrix,
)

# Shape, its partition, the spec, and the partition of the matrix.
CASES = {
    "a plain matrix": ((8, 4), ("x", "y"), (0, 1), ("x", "y")),
    "a transposed one": ((8, 4), ("x", "y"), (1, 0), ("y", "x")),
    "stacked layers": ((2, 8, 4), ("y", "x", None), (-2, -1), ("y", "x", None)),
    "heads, by model dimension": ((8, 2, 4), ("x", None, None), (0, (1, 2)), ("x", None)),
    "heads, by heads": ((8, 4, 2), (None, "x", None), (0, (1, 2)), (None, "x")),
    "heads, by head dimension": ((8, 2, 4), (None, None, "x"), (0, (1, 2)), (None, None)),
    "output of heads, both": ((4, 2, 8), ("x", None, "y"), ((0, 1), 2), ("x", "y")),
    "batch in the middle": ((8, 2, 4), ("x", "y", None), (0, 2), ("y", "x", None)),
    "not sharded": ((8, 4), (None, None), (0, 1), (None, None)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_views_on_an_explicit_mesh_keep_values_and_sharding(name: str, transform) -> None:
    shape, partition, axes, expected = CASES[name]
    spec = WeightDimensionNumbers(*axes)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    whole = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    with jax.set_mesh(mesh):
        weight = jax.device_put(whole, NamedSharding(mesh, PartitionSpec(*partition)))
        assert matrix_partition(weight, spec) == PartitionSpec(*expected)
        matrix = transform(lambda x: to_matrix(x, spec))(weight)
        assert jax.typeof(matrix).sharding.spec == PartitionSpec(*expected)
        back = transform(lambda m, x: from_matrix(m, spec, x))(matrix, weight)
        assert jax.typeof(back) == jax.typeof(weight)
    np.testing.assert_array_equal(matrix, to_matrix(whole, spec))
    np.testing.assert_array_equal(back, whole)
