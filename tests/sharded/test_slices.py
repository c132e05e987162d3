"""Slices on eight devices: what one device computes, with leaves that are cut and that are not."""

from typing import Any

from close import assert_close
from harness.trees import normal_like
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import lowrank_optax as lro

LEAVES = {
    "embed": ((1024, 16), P("x", None)),
    "short": ((192, 16), P("x", None)),  # fewer rows than make whole runs on each device
    "layers": ((8, 16, 32), P("x", None, None)),
    "rows": ((6, 16, 32), P(None, "x", None)),
    "columns": ((6, 16, 32), P(None, None, "y")),
    "bias": ((32,), P("y")),
}
PARAMS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in LEAVES.items()}
STACKED = lambda params: jax.tree.map(
    lambda x: lro.WeightDimensionNumbers(-2, -1) if x.ndim > 2 else None, params
)
SMALL = {"min_size": 100, "block_size": 8}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "low_bit": lambda: lro.low_bit(optax.adamw(1e-2), 4, **SMALL),
    "galore": lambda: lro.galore(
        1e-2, rank=4, refresh_every=2, state_bits=8, weight_dimension_numbers=STACKED
    ),
    "rounded": lambda: optax.chain(lro.in_float32(optax.sgd(1e-3)), lro.round_updates()),
}


@pytest.mark.slow
@pytest.mark.combinations(1)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eight_devices_compute_what_one_does(name: str, axis_type: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    where = {leaf: NamedSharding(mesh, partition) for leaf, (_, partition) in LEAVES.items()}
    dtype = jnp.bfloat16 if name == "rounded" else jnp.float32
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    params, gradients = cast(normal_like(PARAMS, 1)), cast(normal_like(PARAMS, 2))

    def run(tx: Any, put: Any) -> Any:
        placed = put(params)
        state, step = tx.init(placed), jax.jit(tx.update)
        for _ in range(2):
            updates, state = step(put(gradients), state, placed)
            placed = optax.apply_updates(placed, updates)
        return jax.tree.map(np.asarray, placed)

    expected = run(lro.in_slices(OPTIMIZERS[name](), slices="off"), lambda tree: tree)
    with jax.set_mesh(mesh):
        found = run(
            lro.in_slices(OPTIMIZERS[name](), slices=3), lambda tree: jax.device_put(tree, where)
        )
    if name == "rounded":
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert_close(found, expected, units=300)
