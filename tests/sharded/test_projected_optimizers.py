"""Projected optimizers with sharded weights: the same numbers, no gradient gathered."""

from collections.abc import Callable
import math
import re

from harness.row import run
from harness.trees import STEPS, Tree, assert_close, at, normal_like
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import optax
import pytest

import lowrank_optax as lro

LAST_TWO = lro.WeightDimensionNumbers(-2, -1)
RECIPES: dict[str, Callable[..., optax.GradientTransformation]] = {
    "galore": lro.galore,
    "fira": lro.fira,
    "apollo": lro.apollo,
    "online_subspace_descent": lro.online_subspace_descent,
    "dct_adamw": lro.dct_adamw,
    "adarankgrad": lro.adarankgrad,
    "ldadam": lro.ldadam,
}
AT_EVERY_STEP = ("online_subspace_descent", "dct_adamw", "ldadam")  # these move their bases so
# What is sharded: shape, partition. Of each matrix the shorter side is compressed.
LEAVES = {
    "rows": ((8, 6), PartitionSpec("x", None)),
    "columns": ((8, 4), PartitionSpec(None, "x")),
    "layers": ((4, 4, 6), PartitionSpec("x", None, None)),
    "two axes": ((8, 6), PartitionSpec("x", "y")),
}
SHAPES = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in LEAVES.items()}

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def make(name: str, rank: int) -> optax.GradientTransformation:
    """The recipe; its basis is found anew at the first step and the third, if not at each."""
    options = {} if name in AT_EVERY_STEP else {"refresh_every": 2}
    return RECIPES[name](1e-2, rank=rank, weight_dimension_numbers=LAST_TWO, **options)


def make_mesh(axis_type: AxisType) -> Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


# On explicit axes they are compiled by the test of collectives, and run by that of all
# transformations.
ON_AUTO_AXES = ("galore", "dct_adamw", "ldadam")  # the others' bases are found as GaLore's
CASES = [
    *(
        pytest.param(
            name,
            AxisType.Auto,
            id=f"{name}-auto",
            marks=[pytest.mark.full] * (name not in ON_AUTO_AXES),
        )
        for name in RECIPES
    ),
    *(
        pytest.param(name, AxisType.Explicit, id=f"{name}-explicit", marks=pytest.mark.full)
        for name in RECIPES
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axis_type"), CASES)
def test_eight_devices_give_what_one_gives_and_state_stays_where_it_was_put(
    name: str, axis_type: AxisType
) -> None:
    params, gradients = normal_like(SHAPES, 70), normal_like(SHAPES, 80, STEPS)
    tx, mesh = make(name, rank=2), make_mesh(axis_type)
    expected = run(tx, params, gradients)
    where = {leaf: NamedSharding(mesh, partition) for leaf, (_, partition) in LEAVES.items()}
    kept = lro.sharding.state_shardings(tx, params, where)
    # Explicit axes need not be told where anything goes.
    told = {"out_shardings": (None, kept)} if axis_type == AxisType.Auto else {}
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1, **told)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, where)
        state = jax.jit(tx.init, out_shardings=kept)(params)
        for i in range(STEPS):
            given = state
            updates, state = step(jax.device_put(at(gradients, i), where), given, params)
            params = optax.apply_updates(params, updates)
            assert_close(updates, at(expected, i))
            assert_on(state, kept)
            assert all(x.is_deleted() for x in jax.tree.leaves(given))  # its memory was used again


def assert_on(tree: Tree, shardings: Tree) -> None:
    for x, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.combinations(2)
@pytest.mark.parametrize("sharded", ["kept", "compressed"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", RECIPES)
def test_no_collective_of_a_step_is_as_large_as_the_gradient(
    name: str, axis_type: AxisType, sharded: str
) -> None:
    shape, allowed = (64, 96), set()
    if (name, axis_type, sharded) == ("dct_adamw", AxisType.Auto, "compressed"):
        # The scores of all cosines are sums over the compressed axis: partial products are added.
        allowed = {"all-reduce"}
    found = collectives(make(name, rank=4), shape, partition_of(sharded), axis_type)
    assert found, "a sharded step communicates something"
    assert {kind for kind, size in found if size >= math.prod(shape)} == allowed


def test_the_exact_svd_gathers_the_gradient() -> None:
    tx = lro.galore(1e-2, subspace=lro.subspaces.svd(4))
    found = collectives(tx, (64, 96), partition_of("kept"), AxisType.Auto)
    assert ("all-gather", 64 * 96) in found


def partition_of(sharded: str) -> PartitionSpec:
    """Of a wide matrix, the rows of which are compressed."""
    return PartitionSpec("x", None) if sharded == "compressed" else PartitionSpec(None, "x")


def collectives(
    tx: optax.GradientTransformation,
    shape: tuple[int, ...],
    partition: PartitionSpec,
    axis_type: AxisType,
) -> list[tuple[str, int]]:
    """Kind and number of elements of each array that devices exchange in one update."""
    mesh = make_mesh(axis_type)
    where = {"kernel": NamedSharding(mesh, partition)}
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where["kernel"])}
    kept = lro.sharding.state_shardings(tx, params, where)
    placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    with jax.set_mesh(mesh):
        state = jax.tree.map(placed, jax.eval_shape(tx.init, params), kept)
        step = jax.jit(lambda g, s, p: tx.update(g, s, p), out_shardings=(where, kept))
        program = step.lower(params, state, params).compile().as_text()
    return [
        (kind, math.prod(int(size) for size in sizes.split(",") if size))
        for result, kind in COLLECTIVE.findall(program)
        for sizes in re.findall(r"\w+\[([\d,]*)\]", result)
    ]
