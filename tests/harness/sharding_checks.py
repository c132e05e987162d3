"""Eight devices give what one gives, and the state stays where it is."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from harness.row import Row
from harness.trees import Tree, assert_close, assert_same_types, at, normal_like

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


def run_on_one(row: Row) -> list[tuple[Tree, Tree, Tree]]:
    """Parameters and state before each step on one device, and its updates."""
    params, state = INPUTS[0], row.tx.init(INPUTS[0])
    steps = []
    for i in range(STEPS):
        before = params, state
        params, state, updates = row.step(params, state, at(INPUTS[1], i))
        steps.append((*before, updates))
    return steps


def run_sharded(row: Row, mesh: Mesh, expected: list[tuple[Tree, Tree, Tree]]) -> list[Tree]:
    """Compares the updates with those on one device; returns every state.

    Each step starts where that on one device does. So no code that rounding flips in a quantized
    state matters to the next step, and all updates are held to rounding.
    """
    there = lambda x, like: jax.device_put(x, like.sharding) if like.committed else x
    states = [row.tx.init(place(INPUTS[0], mesh))]
    for i, (params, state, wanted) in enumerate(expected):
        placed = place(at(INPUTS[1], i), mesh)
        _, state, updates = row.step(
            place(params, mesh), jax.tree.map(there, state, states[-1]), placed
        )
        assert_same_types(updates, placed)
        assert_close(updates, wanted)
        states.append(state)
    return states


def check_sharded_on_an_auto_mesh(row: Row) -> None:
    """After the first update, which may move it, the state's sharding is stable."""
    mesh = jax.make_mesh(MESH_SHAPE, MESH_AXES, axis_types=(AxisType.Auto,) * 2)
    states = run_sharded(row, mesh, run_on_one(row))
    for x, y in zip(jax.tree.leaves(states[1]), jax.tree.leaves(states[-1]), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def check_sharded_on_an_explicit_mesh(row: Row) -> None:
    """The types of the state, with their shardings, are those of the eager `init`."""
    mesh = jax.make_mesh(MESH_SHAPE, MESH_AXES, axis_types=(AxisType.Explicit,) * 2)
    expected = run_on_one(row)
    with jax.set_mesh(mesh):
        states = run_sharded(row, mesh, expected)
        for state in states[1:]:
            assert_same_types(state, states[0])
