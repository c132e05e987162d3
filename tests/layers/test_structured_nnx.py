"""Structured layers in NNX: guides, conversions, merged weights, and what they compose with."""

import copy
import functools
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
from layers.stacked_net import Net
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.layers import (
    BlockDense,
    BlockShuffle,
    LowRank,
    Structure,
    StructuredFFN,
    StructuredLinear,
    drop_guides,
    keep_merged,
    merge_structured,
    self_guided_schedule,
    set_guide_weight,
    structure_linears,
    structured_layers,
    structured_linear,
)

STRUCTURES = [LowRank(3), BlockDense(4, 2), BlockShuffle(2)]
by_structure = pytest.mark.parametrize(
    "structure",
    [*(pytest.param(x, marks=pytest.mark.full) for x in STRUCTURES[:2]), STRUCTURES[2]],
    ids=str,
)
X = np.random.default_rng(0).standard_normal((3, 8), np.float32)


def linear(structure: Structure = STRUCTURES[2], **options: Any) -> StructuredLinear:
    return nnx.clone(_linear(structure, **options))


@functools.cache
def _linear(structure: Structure, **options: Any) -> StructuredLinear:
    return StructuredLinear(8, 12, structure, rngs=nnx.Rngs(0), **options)


def stacked(structure: Structure = STRUCTURES[2], **options: Any) -> StructuredLinear:
    make = nnx.vmap(lambda rngs: StructuredLinear(8, 8, structure, rngs=rngs, **options))
    return nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))


@by_structure
def test_guide_starts_as_the_product_of_the_factors_which_then_have_no_gradient(
    structure: Structure,
) -> None:
    layer, plain = linear(structure, guide=True), linear(structure)
    assert_close(set_guide_weight(layer, 1.0)(X), plain(X))
    gradient = nnx.grad(lambda layer: jnp.sum(layer(X) ** 2))(layer)
    assert not np.any(gradient["first"]["kernel"])
    assert not np.any(gradient["second"]["kernel"])
    y = structured_linear(X, plain.factors(), structure)
    assert_close(gradient["guide"]["kernel"][...], X.T @ (2 * y))


def test_guided_output_and_gradients_are_the_mixture_of_both() -> None:
    layer = linear(LowRank(3), guide=True)
    layer.guide.kernel[...] = np.random.default_rng(1).standard_normal((8, 12), np.float32)
    (v, u), kernel = layer.factors(), layer.guide.kernel[...]
    dy = np.random.default_rng(2).standard_normal((3, 12), np.float32)
    set_guide_weight(layer, 0.25)

    def output(layer: StructuredLinear, x: jax.Array) -> jax.Array:
        return jnp.sum(layer(x) * dy)

    assert_close(layer(X), 0.25 * X @ kernel + 0.75 * (X @ v) @ u)
    of_layer, of_x = nnx.grad(output, argnums=(0, 1))(layer, jnp.asarray(X))
    assert_close(of_layer["guide"]["kernel"][...], 0.25 * X.T @ dy)
    assert_close(of_layer["second"]["kernel"][...], 0.75 * (X @ v).T @ dy)
    assert_close(of_layer["first"]["kernel"][...], 0.75 * X.T @ (dy @ u.T))
    assert_close(of_x, dy @ (0.25 * kernel + 0.75 * v @ u).T)


def test_weight_near_one_still_lets_bfloat16_factors_learn() -> None:
    layer = linear(guide=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    layer.guide.kernel[...] = jnp.zeros((8, 12), jnp.bfloat16)
    y = set_guide_weight(layer, 0.9985)(jnp.ones((1, 8), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    plain = jnp.ones((1, 8)) @ layer.structure.compose(layer.factors())
    assert_close(y, 0.0015 * plain, 4, dtype=jnp.bfloat16)


def test_schedule_is_that_of_the_paper() -> None:
    cosine = jax.vmap(self_guided_schedule(10))(jnp.arange(12))
    known = [1, 0.975528, 0.904508, 0.793893, 0.654508, 0.5, 0.345492, 0.206107, 0.095492]
    np.testing.assert_allclose(cosine, [*known, 0.024472, 0, 0], atol=1e-6)
    assert cosine.dtype == jnp.float32
    with pytest.raises(ValueError, match="steps must be a positive integer, got 0"):
        self_guided_schedule(0)


def test_guide_is_skipped_as_often_as_its_weight_says() -> None:
    """With a guide of 2 and factors of 1, the mean is 1 + 0.6²; skipped, the output is unscaled."""
    layer = StructuredLinear(3, 3, LowRank(1), guide=True, use_bias=False, rngs=nnx.Rngs(0))
    for kernel, value in ((layer.first.kernel, 1 / 3), (layer.second.kernel, 1.0)):
        kernel[...] = jnp.full(kernel.shape, value)
    layer.guide.kernel[...] = jnp.full((3, 3), 2 / 3)

    @jax.jit
    def outputs(key: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            return set_guide_weight(nnx.clone(layer), 0.6, key)(jnp.ones((1, 3)))[0, 0]

        return jax.vmap(one)(jax.random.split(key, 20_000))

    found = np.asarray(outputs(jax.random.key(0)))
    np.testing.assert_allclose(np.unique(found), [1, 1.6], rtol=1e-6)
    assert abs(found.mean() - 1.36) < 5 * 0.6 * np.sqrt(0.24 / 20_000)


def test_layers_of_a_stack_draw_apart_and_run_under_a_scan() -> None:
    layers = stacked(guide=True)
    layers.guide.kernel[...] = layers.guide.kernel[...] + 1
    keys = [jax.random.fold_in(jax.random.key(7), i) for i in range(8)]
    drawn = jnp.stack([set_guide_weight(layers, 0.5, key).guide_key[...] for key in keys])
    uniform = np.asarray(jax.vmap(jax.vmap(jax.random.uniform))(drawn))
    assert len(np.unique(uniform)) == 24
    set_guide_weight(layers, 0.5, keys[0])

    @jax.jit
    def scanned(x: jax.Array, state: Any) -> jax.Array:
        graph = nnx.graphdef(layers)
        step = lambda x, state: (nnx.merge(graph, state)(x), None)
        return jax.lax.scan(jax.checkpoint(step), x, state)[0]

    y, x = scanned(X, nnx.state(layers)), jnp.asarray(X)
    for i in range(3):
        factors = jax.tree.map(lambda a, i=i: a[i], layers.factors())
        plain = structured_linear(x, factors, layers.structure)
        mixed = 0.5 * x @ layers.guide.kernel[i] + 0.5 * plain
        x = mixed if uniform[0, i] < 0.5 else plain
    assert_close(y, x, 100)


def test_dropping_the_guide_carries_the_optimizer_over() -> None:
    """At a weight of 0 the function stays the same, and so do the moments of what is left."""
    layer, tx = linear(guide=True), lro.low_bit(optax.adam(0.1), bits=8, min_size=1)
    params = nnx.state(layer, nnx.Param)
    update = jax.jit(tx.update)
    _, state = update(jax.tree.map(jnp.ones_like, params), jax.jit(tx.init)(params), params)
    before = set_guide_weight(layer, 0.0)(X)
    drop_guides(layer)
    assert_close(layer(X), before)
    left = nnx.state(layer, nnx.Param)
    carried = lro.adapters.carry_state(jax.eval_shape(tx.init, left), state)
    names = lambda tree: {jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(tree)}
    assert names(carried) == {name for name in names(state) if "guide" not in name}
    gradient = jax.tree.map(jnp.ones_like, left)
    updates, _ = jax.jit(tx.update)(gradient, carried, left)
    assert all(bool(jnp.all(u < 0)) for u in jax.tree.leaves(updates))


def test_guides_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="the layer has a guide, whose weight must be given"):
        linear(guide=True)(X)
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="weight must be from 0 to 1"):
            set_guide_weight(linear(guide=True), wrong)
    with pytest.raises(ValueError, match="weight must be a scalar"):
        set_guide_weight(linear(guide=True), jnp.ones(2))
    for call in (lambda x: set_guide_weight(x, 0.5), drop_guides):
        with pytest.raises(ValueError, match="no layer of the StructuredLinear has a guide"):
            call(linear())
    for shape in ((2, 7), ()):
        with pytest.raises(ValueError, match=r"x has shape .* in_features=8"):
            linear()(jnp.ones(shape))
    with pytest.raises(TypeError, match="structure='lowrank' must be a LowRank"):
        linear("lowrank")  # type: ignore[bad-argument-type]


@by_structure
def test_dense_model_becomes_structured_and_dense_again(structure: Structure) -> None:
    model = Net()
    dense = model.blocks.kernel[...]
    bias = model.blocks.bias[...] = jnp.ones((3, 8))
    report = structure_linears(model, structure, "blocks|out")
    assert [row.path for row in report.rows] == ["blocks", "out"]
    assert model.same[0] is model.out  # one object still
    assert_close(model.blocks.factors(), structure.project(dense), 100)
    assert_close(model.blocks.bias[...], bias)
    assert report.rows[0].parameters == sum(x.size for x in model.blocks.factors())
    assert report.rows[0].weight == "3 × (8 × 8)"
    before = model(X)
    merge_structured(model)
    assert type(model.out) is nnx.Linear
    assert_close(model(X), before, 100)
    with pytest.raises(ValueError, match="structured layer"):
        merge_structured(model)


def test_structures_by_pattern_and_what_cannot_be_converted() -> None:
    model = Net()
    by_pattern = {"out": LowRank(2), "blocks": BlockShuffle(2)}
    rows = structure_linears(model, by_pattern).rows
    assert [str(row.structure) for row in rows] == ["BlockShuffle(blocks=2)", "LowRank(rank=2)"]
    assert rows == structured_layers(model).rows
    model.blocks.add_guide()
    for each in (merge_structured, keep_merged):
        with pytest.raises(ValueError, match="blocks has a guide: drop_guides"):
            each(model)
    with pytest.raises(ValueError, match="linear layer"):
        structure_linears(model, LowRank(2))  # not the factors of structured layers
    model = Net()
    lro.layers.maestro.convert(model, "out")
    with pytest.raises(ValueError, match="linear layer"):
        structure_linears(model, LowRank(2), "out")  # nor those of Maestro's
    model = Net()
    before = nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(ValueError, match="out: blocks=4 leaves zeros"):
        structure_linears(model, {"out": BlockShuffle(4)})
    with pytest.raises(ValueError, match="where='mlp' matches no linear layer"):
        structure_linears(model, LowRank(2), "mlp")
    with pytest.raises(ValueError, match="has no pattern"):
        structure_linears(model, {})
    model.out.preferred_element_type = jnp.float32
    with pytest.raises(ValueError, match=r"out is more than an nnx\.Linear"):
        structure_linears(model, LowRank(2), "out")
    model.out.preferred_element_type = None
    lro.adapters.attach(model, lro.adapters.LoRA(rank=1), where="out", rngs=1)
    with pytest.raises(ValueError, match=r"out is more than an nnx\.Linear"):
        structure_linears(model, LowRank(2), "out")
    lro.adapters.detach(model)
    assert_close(nnx.to_pure_dict(nnx.state(model)), before)


def test_few_rows_meet_the_merged_weight_and_many_the_factors() -> None:
    layer = keep_merged(linear(), rows=4)
    layer.merged[...] = jnp.ones((8, 12))  # to see which is used
    ones = jnp.ones((2, 2, 8))
    assert_close(layer(ones), np.full((2, 2, 12), 8, np.float32))
    assert_close(layer(jnp.ones((5, 8))), linear()(jnp.ones((5, 8))))
    assert keep_merged(layer, rows=0).merged is None
    assert_close(keep_merged(layer)(ones), linear()(ones))
    assert not any("merged" in path for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param)))
    for wrong in (-1, 2.5):
        with pytest.raises(ValueError, match="rows must be an integer of at least 0"):
            keep_merged(layer, rows=wrong)  # type: ignore[bad-argument-type]


@pytest.mark.parametrize("rows", [2, 5])
def test_layer_with_a_merged_weight_is_not_trained(rows: int) -> None:
    """By few rows the factors would have no gradient, and by many the weight would not follow."""
    layer, x = keep_merged(linear(), rows=4), jnp.ones((rows, 8))
    gradient = jax.jit(nnx.grad(lambda layer: jnp.sum(layer(x))))
    with pytest.raises(ValueError, match="a merged weight cannot be trained"):
        gradient(layer)
    assert jnp.any(gradient(keep_merged(layer, rows=0))["first"]["kernel"][...])


def test_adapters_are_not_lost_beside_a_merged_weight() -> None:
    model = nnx.Sequential(keep_merged(linear(), rows=4))
    lro.adapters.attach(model, lro.adapters.LoRA(rank=1), where="first", rngs=1)
    with pytest.raises(ValueError, match="the factors of the layer have adapters"):
        model(X)


def loss_of(graph: nnx.GraphDef, params: Any) -> jax.Array:
    return jnp.mean(nnx.merge(graph, params)(X) ** 2)


@pytest.mark.slow
def test_galore_with_moments_in_8_bits_trains_stacked_factors() -> None:
    """Every block of every layer is a matrix of its own, with a basis of its own."""

    class Scanned(nnx.Module):
        def __init__(self) -> None:
            self.blocks = stacked(BlockShuffle(2))

        def __call__(self, x: jax.Array) -> jax.Array:
            graph, state = nnx.split(self.blocks)
            step = lambda x, state: (nnx.merge(graph, state)(x), None)
            return jax.lax.scan(step, x, state)[0]

    model = Scanned()
    specs = lro.weight_dimension_numbers(model)
    options = {"rank": 2, "refresh_every": 2, "weight_dimension_numbers": specs}
    tx = lro.low_bit(lro.galore(0.05, **options), 8, min_size=1)
    graph, params = nnx.split(model)
    state = jax.jit(tx.init)(params)
    bases = [x.shape for x in jax.tree.leaves(state) if x.ndim == 4 and x.dtype == jnp.float32]
    assert (3, 2, 4, 2) in bases

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(functools.partial(loss_of, graph))(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(12):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]


@pytest.mark.slow
def test_lora_attaches_to_the_factors_and_merges() -> None:
    model = nnx.Sequential(linear())
    before = model(X)
    method = lro.adapters.LoRA(rank=1)
    lro.adapters.attach(model, method, where="first|second", rngs=1)
    assert_close(model(X), before)
    adapters = nnx.state(model, lro.adapters.trainable)
    shapes = {x.shape for x in jax.tree.leaves(adapters)}
    assert shapes == {(2, 4, 1), (2, 1, 4), (2, 1, 6)}
    nnx.update(model, jax.tree.map(jnp.ones_like, adapters))
    adapted = model(X)
    assert float(jnp.max(jnp.abs(adapted - before))) > 1
    with pytest.raises(ValueError, match="the factors of layers/0 have adapters"):
        merge_structured(model)
    lro.adapters.merge(model)
    lro.adapters.detach(model)
    assert_close(model(X), adapted, 100)
    assert_close(merge_structured(model)(X), adapted, 100)


@pytest.mark.full
def test_few_bit_activations_inside_give_nearly_the_gradient() -> None:
    structure = BlockShuffle(2)
    make = functools.partial(StructuredFFN, 8, 16, structure, rngs=nnx.Rngs(3))
    plain = make()
    few = nnx.clone(plain)
    few.activation = functools.partial(lro.activations.gelu, bits=3)
    gradient = nnx.jit(nnx.grad(lambda m: jnp.sum(m(X))))
    few_grad, grad = gradient(few), gradient(plain)
    assert_close(few(X), plain(X))
    last = lambda g: np.ravel(g["first"]["second"]["kernel"][...])
    cosine = np.dot(last(few_grad), last(grad)) / np.prod(
        [np.linalg.norm(last(g)) for g in (few_grad, grad)]
    )
    assert 0.95 < cosine < 1 - 1e-6
    assert_close(copy.deepcopy(few)(X), few(X))


def test_linen_through_the_bridge() -> None:
    module = nnx.bridge.to_linen(StructuredLinear, 8, 12, LowRank(2))
    variables = module.init(jax.random.key(0), X)
    assert module.apply(variables, X).shape == (3, 12)


def test_on_eight_devices_every_part_of_the_batch_draws_alike() -> None:
    layer = set_guide_weight(linear(guide=True), 0.5, jax.random.key(0))
    layer.guide.kernel[...] = layer.guide.kernel[...] + 1
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = np.random.default_rng(5).standard_normal((16, 8), np.float32)
    of_device = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    graph, state = nnx.split(layer)
    call = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    y = call(state, jax.device_put(x, of_device))
    assert y.sharding.is_equivalent_to(of_device, 2)
    assert_close(y, layer(x))
