"""The update inside the backward pass on eight devices: what one device computes."""

import re
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.training import LayeredFunctions

LAYERS, WIDTH, HIDDEN, WORDS = 3, 16, 32, 64
FUNCTIONS = LayeredFunctions(
    embed=lambda params, batch, key: params["embed"][batch[:, :-1]],
    block=lambda layer, x, batch, key: (
        x + jnp.tanh(x @ layer["up"] * jax.random.bernoulli(key, 0.5, (HIDDEN,))) @ layer["down"]
    ),
    head=lambda params, x, batch, key: jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], batch[:, 1:])
    ),
)
SHAPES = {
    "embed": ((WORDS, WIDTH), P(None, "x")),
    "blocks": {
        "up": ((LAYERS, WIDTH, HIDDEN), P(None, None, "x")),
        "down": ((LAYERS, HIDDEN, WIDTH), P(None, "x", None)),
    },
    "head": ((WIDTH, WORDS), P("x", None)),
}
IS_PAIR = lambda x: isinstance(x, tuple)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placed", "each"),
    [
        pytest.param("data parallel", None, marks=pytest.mark.full),
        ("FSDP", None),
        pytest.param("FSDP", "slice", marks=pytest.mark.full),
    ],
)
def test_eight_devices_compute_what_one_does(placed: str, each: Any) -> None:
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x[0]) / 4, jnp.float32), SHAPES, is_leaf=IS_PAIR
    )
    batch = jnp.asarray(random.integers(0, WORDS, (16, 9)))
    tx = optax.adamw(1e-2, eps=1e-3) if each is None else optax.lamb(1e-2, eps=1e-3)
    update = lro.update_in_backward(
        FUNCTIONS, tx, clip="global", max_norm=0.1, micro_batches=2, each=each
    )

    def run(params: Any, batch: Any) -> Any:
        state, losses = tx.init(params), []
        jitted = jax.jit(update.step, donate_argnums=(0, 1))
        # Compiled for a state that is placed as the steps leave it.
        step = jitted.lower(params, state, batch, jax.random.key(0)).compile()
        state = jax.device_put(state, step.input_shardings[0][1])
        for i in range(3):
            params, state, loss, _ = step(params, state, batch, jax.random.key(i))
            losses.append(np.asarray(loss))
        return params, losses, step.as_text()

    expected, losses, _ = run(jax.tree.map(jnp.copy, params), batch)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    where = jax.tree.map(
        lambda x: NamedSharding(mesh, x[1] if placed == "FSDP" else P()), SHAPES, is_leaf=IS_PAIR
    )
    split = jax.device_put(batch, NamedSharding(mesh, P("x")))
    found, found_losses, program = run(jax.device_put(params, where), split)
    assert_close(found_losses, losses, 100)
    assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected), 300)
    kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found, where)
    assert all(jax.tree.leaves(kept))
    # Gradients and weights go from device to device one block at a time, never a whole stack.
    exchanged = re.findall(r"= (.*) (?:all-|reduce-scatter|collective-)[a-z-]*\(", program)
    assert exchanged
    assert not [shapes for shapes in exchanged if f"[{LAYERS}," in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.full)])
def test_a_projected_update_runs_layer_by_layer_on_a_mesh(devices: int) -> None:
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x[0]) / 4, jnp.float32), SHAPES, is_leaf=IS_PAIR
    )
    batch = jnp.asarray(random.integers(0, WORDS, (16, 9)))
    stacked = lambda params: jax.tree.map(
        lambda x: lro.WeightDimensionNumbers(-2, -1) if x.ndim > 2 else None, params
    )
    tx = lro.galore(1e-2, rank=4, eps=1e-3, weight_dimension_numbers=stacked)
    step = jax.jit(lro.update_in_backward(FUNCTIONS, tx).step)
    expected = step(params, tx.init(params), batch, jax.random.key(0))[0]
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
    where = jax.tree.map(lambda x: NamedSharding(mesh, x[1]), SHAPES, is_leaf=IS_PAIR)
    placed, split = (
        jax.device_put(params, where),
        jax.device_put(batch, NamedSharding(mesh, P("x"))),
    )
    found = step(placed, tx.init(placed), split, jax.random.key(0))[0]
    assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected), 300)


@pytest.mark.slow
def test_frozen_stacks_stay_sharded_and_adapters_get_their_updates() -> None:
    random = np.random.default_rng(0)
    shapes = SHAPES | {
        "blocks": SHAPES["blocks"]
        | {"a": ((LAYERS, WIDTH, 2), P()), "b": ((LAYERS, 2, HIDDEN), P(None, None, "x"))}
    }
    tree = jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x[0]) / 4, jnp.float32), shapes, is_leaf=IS_PAIR
    )
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    where = jax.tree.map(lambda x: NamedSharding(mesh, x[1]), shapes, is_leaf=IS_PAIR)

    def split(tree: Any) -> tuple[Any, Any]:
        blocks = tree["blocks"]
        trained, held = ({k: blocks[k] for k in names} for names in (("a", "b"), ("up", "down")))
        return {"blocks": trained}, tree | {"blocks": held}

    def block(layer: Any, x: jax.Array, batch: Any, key: Any) -> jax.Array:
        layer = layer | {"up": layer["up"] + layer["a"] @ layer["b"]}
        return FUNCTIONS.block(layer, x, batch, key)

    batch = jnp.asarray(random.integers(0, WORDS, (16, 9)))
    update = lro.update_in_backward(FUNCTIONS._replace(block=block), optax.sgd(0.1, 0.9))
    step = jax.jit(update.step)

    def run(tree: Any, batch: Any) -> Any:
        params, frozen = split(tree)
        return step(params, update.init(params), batch, jax.random.key(0), frozen)

    expected, _, loss, _ = run(tree, batch)
    placed = jax.device_put((tree, batch), (where, NamedSharding(mesh, P("x"))))
    found, _, found_loss, _ = run(*placed)
    assert_close(found_loss, loss, 100)
    assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected), 300)
    kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found, split(where)[0])
    assert all(jax.tree.leaves(kept))
