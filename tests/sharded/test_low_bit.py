"""Low-bit states on eight devices: codes where their parameters are, and nothing gathered."""

from typing import Any

from close import assert_close
from harness.trees import normal_like
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import optax
import pytest

import lowrank_optax as lro
from tests.sharded.test_projected_optimizers import collectives
from tests.states.low_bit_runs import assert_same_state

BLOCK = 8
# Shape, partition, and those of codes in 8 bits, in 4 bits, and of scales. A device has whole
# blocks and, in rows, whole runs of 64, but for "ragged".
LEAVES = {
    "rows": ((256, 16), P("x", None), P("x"), P("x"), P("x")),
    "columns": ((64, 64), P(None, "x"), P(None, "x"), P(None, "x"), P(None, "x")),
    "both": ((256, 32), P("x", "y"), P("x", "y"), P("x", "y"), P("x", "y")),
    "layers": ((4, 64, 16), P("x", None, None), P("x"), P("x"), P("x")),
    "whole": ((64, 16), P(), P(), P(), P()),
}
PARAMS = {name: jax.ShapeDtypeStruct(leaf[0], jnp.float32) for name, leaf in LEAVES.items()}
axis_types = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
bits_of_codes = pytest.mark.parametrize("bits", [8, 4])


def low_bit(bits: Any) -> Any:
    return lro.low_bit(optax.scale_by_adam(), bits, block_size=BLOCK, min_size=512)


def make_mesh(axis_type: AxisType) -> Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def shardings_on(mesh: Mesh) -> dict[str, NamedSharding]:
    return {name: NamedSharding(mesh, leaf[1]) for name, leaf in LEAVES.items()}


@pytest.mark.slow
@pytest.mark.combinations(1)
@axis_types
@bits_of_codes
def test_codes_and_scales_lie_where_their_parameters_do(bits: Any, axis_type: AxisType) -> None:
    mesh, tx = make_mesh(axis_type), low_bit(bits)
    found = lro.sharding.state_shardings(tx, PARAMS, shardings_on(mesh))
    arrays = jax.eval_shape(tx.init, PARAMS)
    for name, (_, _, eight, four, scales) in LEAVES.items():
        for moment in ("mu", "nu"):
            wanted = {"codes": eight if bits == 8 else four, "scales": scales}
            for field, partition in wanted.items():
                sharding = getattr(getattr(found, field), moment)[name]
                array = getattr(getattr(arrays, field), moment)[name]
                assert sharding.is_equivalent_to(NamedSharding(mesh, partition), array.ndim), (
                    name,
                    field,
                    sharding,
                )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "axis_type"),
    [
        pytest.param(8, AxisType.Auto, id="8-auto"),
        pytest.param(4, AxisType.Explicit, id="4-explicit"),
        pytest.param(8, AxisType.Explicit, id="8-explicit", marks=pytest.mark.full),
        pytest.param(4, AxisType.Auto, id="4-auto", marks=pytest.mark.full),
    ],
)
def test_eight_devices_store_the_codes_of_one(bits: Any, axis_type: AxisType) -> None:
    mesh, tx = make_mesh(axis_type), low_bit(bits)
    chosen = {name: PARAMS[name] for name in ("both", "layers")}
    params, gradients = normal_like(chosen, 1), [normal_like(chosen, seed) for seed in (2, 3)]
    where = {name: x for name, x in shardings_on(mesh).items() if name in chosen}
    kept = lro.sharding.state_shardings(tx, params, where)
    told = {"out_shardings": (None, kept)} if axis_type == AxisType.Auto else {}
    update = lambda g, s, p: tx.update(g, s, p)
    one, eight = jax.jit(update), jax.jit(update, donate_argnums=1, **told)
    state = jax.jit(tx.init)(params)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, where)
        sharded = jax.jit(tx.init, out_shardings=kept)(placed)
    for gradient in gradients:
        expected, state = one(gradient, state, params)
        with jax.set_mesh(mesh):
            updates, sharded = eight(jax.device_put(gradient, where), sharded, placed)
        assert_same_state(sharded, state, bits)
        assert_close(updates, expected, 100)
    for x, sharding in zip(jax.tree.leaves(sharded), jax.tree.leaves(kept), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


@bits_of_codes
@pytest.mark.parametrize("partition", [P("x", None), P(None, "x"), P("x", "y")], ids=str)
def test_nothing_is_exchanged_where_devices_have_whole_blocks(bits: Any, partition: P) -> None:
    assert collectives(low_bit(bits), (256, 64), partition, AxisType.Auto) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "axis_type"),
    [
        pytest.param(4, AxisType.Explicit, id="4-explicit"),
        pytest.param(8, AxisType.Auto, id="8-auto"),
        pytest.param(8, AxisType.Explicit, id="8-explicit", marks=pytest.mark.full),
        pytest.param(4, AxisType.Auto, id="4-auto", marks=pytest.mark.full),
    ],
)
def test_blocks_over_several_devices_give_the_same_codes(bits: Any, axis_type: AxisType) -> None:
    """Which arrays are quantized, and their blocks, follow from global shapes alone."""
    tx = lro.low_bit(optax.scale_by_adam(), bits, block_size=16, min_size=512)
    mesh = make_mesh(axis_type)
    params = normal_like({"kernel": jax.ShapeDtypeStruct((16, 40), jnp.float32)}, 1)
    where = {"kernel": NamedSharding(mesh, P("x", "y"))}
    step = jax.jit(lambda p: tx.update(p, tx.init(p), p)[1])
    with jax.set_mesh(mesh):
        sharded = step(jax.device_put(params, where))
    assert_same_state(sharded, step(params), bits)
