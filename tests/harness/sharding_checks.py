"""Eight devices give what one gives, and the state stays where it is."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from harness.row import Row
from harness.trees import Tree, assert_same_types, at, normal_like, stack

MESH_SHAPE, MESH_AXES = (4, 2), ("x", "y")
# Every axis of a matrix in turn, and stacked layers: shape, sharding.
LEAVES = {
    "rows": ((8, 6), PartitionSpec("x", None)),
    "columns": ((6, 8), PartitionSpec(None, "x")),
    "layers": ((2, 8, 4), PartitionSpec("y", "x", None)),
    "bias": ((4,), PartitionSpec("y")),
}
SHAPES = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in LEAVES.items()}
STEPS = 4  # to the second refresh
INPUTS = normal_like(SHAPES, 70), normal_like(SHAPES, 80, STEPS)


def place(tree: Tree, mesh: Mesh) -> Tree:
    return {n: jax.device_put(x, NamedSharding(mesh, LEAVES[n][1])) for n, x in tree.items()}


def run_sharded(row: Row, mesh: Mesh, expected: Tree) -> list[Tree]:
    """Compares the updates with those on one device; returns every state."""
    params = place(INPUTS[0], mesh)
    states, results = [row.tx.init(params)], []
    for i in range(STEPS):
        placed = place(at(INPUTS[1], i), mesh)
        params, state, updates = row.step(params, states[-1], placed)
        assert_same_types(updates, placed)
        results.append(updates)
        states.append(state)
    row.assert_close(stack(results), expected)
    return states


def check_sharded_on_an_auto_mesh(row: Row) -> None:
    """After the first update, which may move it, the state's sharding is stable."""
    mesh = jax.make_mesh(MESH_SHAPE, MESH_AXES, axis_types=(AxisType.Auto,) * 2)
    states = run_sharded(row, mesh, row.run(*INPUTS))
    for x, y in zip(jax.tree.leaves(states[1]), jax.tree.leaves(states[-1]), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def check_sharded_on_an_explicit_mesh(row: Row) -> None:
    """The types of the state, with their shardings, are those of the eager `init`."""
    mesh = jax.make_mesh(MESH_SHAPE, MESH_AXES, axis_types=(AxisType.Explicit,) * 2)
    expected = row.run(*INPUTS)
    with jax.set_mesh(mesh):
        states = run_sharded(row, mesh, expected)
        for state in states[1:]:
            assert_same_types(state, states[0])
