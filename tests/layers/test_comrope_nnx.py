"""The ComRoPE layer: what it computes, how it starts, and what it composes with."""

import operator
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.layers import ComRoPE
from lowrank_optax.layers.comrope import grid_positions, position_rotations, rotate_heads

call = nnx.jit(lambda rope, q, k: rope(q, k, GRID))
run_model = nnx.jit(lambda model, x: model(x))
GRID = grid_positions((2, 3), class_token=True)


class Mixer(nnx.Module):
    """Attention of one head group with ComRoPE on a grid."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        types = {"param_dtype": dtype, "rngs": rngs}
        self.query = nnx.Linear(16, 16, **types)
        self.key = nnx.Linear(16, 8, **types)
        self.rope = ComRoPE(1, 8, num_axes=2, block_size=4, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        split = lambda y: y.reshape(*y.shape[:-1], -1, 8)
        q, k = self.rope(split(self.query(x)), split(self.key(x)), GRID)
        return jax.nn.dot_product_attention(q, k, split(x)[..., :1, :])


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, 7, 16))


@pytest.mark.parametrize("variant", ["ld", "ap"])
def test_scores_are_of_relative_positions(variant: Any) -> None:
    rope = ComRoPE(2, 16, num_axes=2, variant=variant, rngs=nnx.Rngs(0))
    q, k = jax.random.normal(jax.random.key(1), (2, 3, 7, 2, 16))

    @nnx.jit
    def scores(rope: ComRoPE, positions: jax.Array) -> jax.Array:
        return jnp.einsum("bqhd,bkhd->bhqk", *rope(q, k, positions), precision="highest")

    before = scores(rope, GRID)
    shift = jnp.asarray([1.0, -0.5])
    assert_close(scores(rope, GRID + shift), before, units=400)
    some = GRID.at[0].add(shift)  # the class token stays with the rest, or scores change
    assert np.abs(scores(rope, some) - before).max() > 0.1


def test_initial_values_and_zero_std() -> None:
    rope = ComRoPE(64, 16, num_axes=2, init_std=0.5, rngs=nnx.Rngs(0))
    assert rope.angle_matrices.shape == (64, 2, 8, 8)
    assert rope.axis_scale.shape == (2, 2)
    np.testing.assert_allclose(np.std(rope.angle_matrices[...]), 0.5, rtol=0.03)
    assert ComRoPE(2, 16, variant="ap", rngs=nnx.Rngs(0)).axis_scale is None
    still = ComRoPE(2, 16, num_axes=2, init_std=0, rngs=nnx.Rngs(0))
    q = jax.random.normal(jax.random.key(1), (7, 2, 16))
    np.testing.assert_array_equal(call(still, q, q)[0], q)
    loss = lambda rope: jnp.sum(rope(q, q, GRID)[0] * jnp.arange(16))
    gradient = nnx.jit(nnx.grad(loss))(still)
    assert np.isfinite(gradient["angle_matrices"][...]).all()
    assert np.any(gradient["angle_matrices"][...])  # it can leave the old network


def test_grouped_queries_turn_with_their_key() -> None:
    rope = ComRoPE(2, 8, num_axes=2, rngs=nnx.Rngs(0))
    q = jax.random.normal(jax.random.key(1), (7, 4, 8))
    found, _ = call(rope, q, q[:, :2])
    for head in range(4):
        angles = rope.angle_matrices[head // 2 : head // 2 + 1]
        rotations = jax.jit(position_rotations)(GRID, angles, rope.axis_scale[...])
        assert_close(found[:, head : head + 1], rotate_heads(q[:, head : head + 1], rotations))


def test_linen_by_the_bridge_computes_the_same() -> None:
    model = nnx.bridge.to_linen(ComRoPE, 2, 8, num_axes=2)
    q = jax.random.normal(jax.random.key(1), (7, 2, 8))
    variables = model.init(jax.random.key(0), q, q, GRID)
    params = variables["params"]
    rotations = position_rotations(GRID, params["angle_matrices"], params["axis_scale"])
    assert_close(model.apply(variables, q, q, GRID)[0], rotate_heads(q, rotations))


def test_optimizers_see_vectors_and_decay_leaves_them(x: jax.Array) -> None:
    model = Mixer(nnx.Rngs(0))
    specs = lro.weight_dimension_numbers(model)
    assert specs["rope"] == {"angle_matrices": None, "axis_scale": None}
    graphdef, params = nnx.split(model, nnx.Param)
    by_names = lro.weight_dimension_numbers(params)
    assert by_names["rope"]["axis_scale"] is None
    assert specs["query"]["kernel"] is not None
    loss = lambda params: jnp.sum(nnx.merge(graphdef, params)(x) ** 2)
    gradient = jax.jit(jax.grad(loss))(params)
    for tx in (
        lro.galore(1e-2, rank=2, weight_dimension_numbers=specs),
        lro.low_bit(optax.adam(1e-2), bits=8, min_size=4),
    ):
        state = tx.init(params)
        updates, _ = jax.jit(tx.update)(gradient, state, params)
        for name in ("angle_matrices", "axis_scale"):
            expected = -1e-2 * np.sign(gradient["rope"][name][...])  # Adam's first step
            moved = np.abs(gradient["rope"][name][...]) > 1e-5
            found = updates["rope"][name][...]
            np.testing.assert_allclose(found[moved], expected[moved], rtol=0.05)


def test_adapters_attach_to_the_projections_beside_it(x: jax.Array) -> None:
    model = Mixer(nnx.Rngs(0))
    before = run_model(model, x)
    lro.adapters.attach(model, lro.adapters.LoRA(rank=2), where="query", rngs=nnx.Rngs(1))
    assert_close(run_model(model, x), before)


def test_bfloat16_parameters_and_activations_have_float32_rotations() -> None:
    rope = ComRoPE(2, 16, num_axes=2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    q = jax.random.normal(jax.random.key(1), (7, 2, 16), jnp.bfloat16)
    found, _ = call(rope, q, q)
    wide = ComRoPE(2, 16, num_axes=2, rngs=nnx.Rngs(0))
    wide.angle_matrices[...] = rope.angle_matrices[...].astype(jnp.float32)
    wide.axis_scale[...] = rope.axis_scale[...].astype(jnp.float32)
    expected, _ = call(wide, q.astype(jnp.float32), q.astype(jnp.float32))
    assert found.dtype == jnp.bfloat16
    assert_close(found, expected.astype(jnp.bfloat16), units=1, dtype=jnp.bfloat16)


def test_layers_stacked_by_vmap_and_run_by_scan(x: jax.Array) -> None:
    make = nnx.vmap(lambda rngs: ComRoPE(2, 8, num_axes=2, rngs=rngs))
    stack = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))
    q = x.reshape(2, 7, 2, 8)
    run = nnx.scan(lambda q, rope: rope(q, q, GRID)[0], in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    loss = lambda stack: jnp.sum(run(q, stack) * jnp.arange(8))
    gradient = nnx.jit(nnx.grad(loss))(stack)
    graphdef, state = nnx.split(stack)
    assert gradient["angle_matrices"].shape == (3, 2, 1, 8, 8)

    def unrolled(state: Any) -> jax.Array:
        y = q
        for i in range(3):
            y = nnx.merge(graphdef, jax.tree.map(operator.itemgetter(i), state))(y, y, GRID)[0]
        return jnp.sum(y * jnp.arange(8))

    assert_close(gradient, jax.jit(jax.grad(unrolled))(state), units=200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 12}, r"block_size=8 does not divide head_dim=12.*\[2, 3, 4, 6, 12\]"),
        ({"block_size": 1}, "block_size must be an integer of at least 2, got 1"),
        ({"num_axes": 0}, "num_axes must be a positive integer, got 0"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ({"variant": "xy"}, "variant must be 'ld' or 'ap', got 'xy'"),
        ({"variant": "ap", "num_axes": 3}, "2 blocks of a head among 3 axes"),
        ({"init_std": -1.0}, "init_std must be a finite number"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ComRoPE(**({"num_heads": 2, "head_dim": 16, "rngs": nnx.Rngs(0)} | options))


@pytest.mark.parametrize(
    ("q", "k", "positions", "message"),
    [
        ((7, 2, 16), (7, 2, 16), (7, 1), "num_axes=2"),
        ((7, 4, 16), (7, 4, 16), (7, 2), "num_heads=2"),
        ((7, 3, 16), (7, 2, 16), (7, 2), "a multiple of 2 heads"),
        ((7, 2, 8), (7, 2, 8), (7, 2), "a multiple of 2 heads, 16"),
    ],
)
def test_bad_shapes_are_refused(q: Any, k: Any, positions: Any, message: str) -> None:
    rope = ComRoPE(2, 16, num_axes=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        rope(jnp.zeros(q), jnp.zeros(k), jnp.zeros(positions))
