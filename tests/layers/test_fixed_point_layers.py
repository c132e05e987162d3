"""Models in fixed point: conversion by pattern, calibration, training, and the end of training."""

import copy
import dataclasses
import pickle
from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

pytest.importorskip("flax")

from flax import nnx

import lowrank_optax as lro
from lowrank_optax.layers import BinaryPoint, FixedPointFormat, LayerFormats
from lowrank_optax.models import Decoder, decoder_config, generate

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
TOKENS = jnp.arange(24).reshape(2, 12) * 7 % 64


class Network(nnx.Module):
    """A linear layer, a norm and a head."""

    def __init__(self, rngs: nnx.Rngs, **options: Any) -> None:
        self.up = nnx.Linear(6, 8, rngs=rngs, **options)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.down = nnx.Linear(8, 3, rngs=rngs, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.norm(self.up(x)).clip(0))


run = lambda model, x: model(x)


@pytest.fixture(scope="module")
def in_eight_bits() -> Network:
    """Do not change it: take `copy.deepcopy`."""
    model = Network(nnx.Rngs(0))
    lro.layers.convert_to_fixed_point(model, 8)
    lro.layers.calibrate_fixed_point(model, run, X)
    return model


def test_what_was_converted_is_printed_and_weights_keep_their_paths(in_eight_bits: Any) -> None:
    plain = Network(nnx.Rngs(0))
    assert str(lro.layers.fixed_point_layers(in_eight_bits)) == (
        "path  layer   input  weight  bias  output\n"
        "down  Linear      8       8     8       8\n"
        "norm  Norm        8       8     8       8\n"
        "up    Linear      8       8     8       8"
    )
    paths = lambda model: {p for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    more = paths(in_eight_bits) - paths(plain)
    assert paths(plain) <= paths(in_eight_bits)
    assert {path[-1] for path in more} == {"integer_bits"}
    np.testing.assert_array_equal(in_eight_bits.up.kernel[...], plain.up.kernel[...])
    assert isinstance(in_eight_bits.up, lro.layers.FixedPointLinear)


def test_a_pattern_chooses_layers_and_a_second_conversion_starts_again() -> None:
    model = Network(nnx.Rngs(0))
    lro.layers.convert_to_fixed_point(model, 8, "up|down")
    assert type(model.norm) is nnx.BatchNorm
    summary = lro.layers.fixed_point_layers(model)
    assert summary.in_float == ["norm"]
    assert str(summary).endswith("in float: norm")
    formats = LayerFormats(weight=FixedPointFormat(6, ones=2), output=None)
    lro.layers.convert_to_fixed_point(model, formats, "down")
    rows = {row.path: row for row in lro.layers.fixed_point_layers(model).rows}
    assert rows["up"].formats["weight"].bits == 8
    assert rows["down"].formats["weight"] == formats.weight
    assert "output" not in rows["down"].formats
    assert np.isnan(model.down.input_quantizer.integer_bits[...])


def test_statistics_are_folded_into_scale_and_bias() -> None:
    rng = np.random.default_rng(1)
    for options in ({}, {"use_scale": False}, {"use_bias": False}):
        norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0), use_running_average=True, **options)
        norm.mean[...], norm.var[...] = rng.normal(size=4), rng.uniform(0.1, 2, 4)
        for name in ("scale", "bias"):
            if getattr(norm, name) is not None:
                getattr(norm, name)[...] = jnp.asarray(rng.normal(size=4), jnp.float32)
        x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
        expected = norm(x)
        model = nnx.Sequential(norm)
        lro.layers.convert_to_fixed_point(model, 24)
        lro.layers.calibrate_fixed_point(model, run, x, rule="max")
        assert not nnx.state(model, nnx.BatchStat)
        assert float(jnp.abs(model(x) - expected).max()) < 1e-5


def test_a_layer_computes_the_formula_and_has_its_gradients(in_eight_bits: Any) -> None:
    """Against the straight-through formulas in float64, of input, kernel, bias and points."""
    layer = copy.deepcopy(in_eight_bits.up)
    layer.weight_quantizer.integer_bits[...] = jnp.asarray(-1.0)  # saturates some
    g = np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32)
    loss = lambda layer, x: jnp.vdot(g, layer(x))
    y = layer(X)
    by_layer, by_x = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(layer, X)

    def quantized(name: str, x: Any) -> Any:
        """Numbers, and both derivatives."""
        x = np.asarray(x, np.float64)
        step = 2.0 ** (float(jnp.round(getattr(layer, f"{name}_quantizer").integer_bits[...])) - 8)
        q = step * np.clip(np.floor(x / step + 0.5), -128, 127)
        inside = (x >= -128.5 * step) & (x <= 127.5 * step)
        return q, inside, np.log(2) * np.where(inside, q - x, q)

    x, x_inside, x_slope = quantized("input", X)
    w, w_inside, w_slope = quantized("weight", layer.kernel[...])
    b, _, b_slope = quantized("bias", layer.bias[...])
    out, out_inside, out_slope = quantized("output", x @ w + b)
    np.testing.assert_array_equal(np.asarray(y, np.float64), out)
    assert 0 < w_inside.mean() < 1
    ct = g * out_inside
    assert_close(by_x, (ct @ w.T) * x_inside, 100, dtype=np.float32)
    assert_close(by_layer["kernel"][...], (x.T @ ct) * w_inside, 100, dtype=np.float32)
    assert_close(by_layer["bias"][...], ct.sum(0), 100, dtype=np.float32)
    for name, expected in (
        ("input", (ct @ w.T) * x_slope),
        ("weight", (x.T @ ct) * w_slope),
        ("bias", ct.sum(0) * b_slope),
        ("output", g * out_slope),
    ):
        found = by_layer[f"{name}_quantizer"]["integer_bits"][...]
        assert_close(found, expected.sum(), 200, size=np.abs(expected).sum(), dtype=np.float32)


def test_training_moves_weights_and_points_and_lowers_the_loss(in_eight_bits: Any) -> None:
    model = copy.deepcopy(in_eight_bits)
    points = nnx.state(copy.deepcopy(model), BinaryPoint)
    tx = optax.partition(
        {"points": optax.adam(1e-2), "weights": optax.adamw(1e-2)},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "points" if "integer_bits" in jax.tree_util.keystr(path) else "weights",
            params,
        ),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    target = jnp.sin(X[:, :3] * 2)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> jax.Array:
        loss = lambda model: jnp.mean((model(X) - target) ** 2)
        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    states = (nnx.as_pure(state) for state in (nnx.state(model, BinaryPoint), points))
    moved = jax.tree.map(lambda a, b: bool(a != b), *states)
    # Not of an input that is another layer's output: it is not rounded again.
    for layer in ("up", "norm", "down"):
        assert moved[layer]["weight_quantizer"]["integer_bits"]
    assert moved["up"]["input_quantizer"]["integer_bits"]


def test_points_are_frozen_at_the_integer_with_the_lower_loss(in_eight_bits: Any) -> None:
    model = copy.deepcopy(in_eight_bits)
    targets = run(model, X)
    loss = lambda model: ((model(X) - targets) ** 2).sum()
    for quantizer in (model.up.output_quantizer, model.down.weight_quantizer):
        # Just across the threshold to an integer that is worse than the one it started at.
        quantizer.integer_bits[...] = quantizer.integer_bits[...] - 0.6
    assert loss(model) > 0
    lro.layers.freeze_binary_points(model, loss)
    assert loss(model) == 0
    assert not jax.tree.leaves(nnx.state(model, BinaryPoint))
    frozen = jax.tree.leaves(nnx.state(model, lro.layers.FrozenBinaryPoint))
    assert len(frozen) == 12
    assert all(x == jnp.round(x) for x in frozen)


def test_calibration_adds_up_batches_and_repeated_calls() -> None:
    layer = nnx.Linear(6, 6, rngs=nnx.Rngs(0))

    class Twice(nnx.Module):
        def __init__(self) -> None:
            self.layer = layer

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layer(self.layer(x))

    model = Twice()
    lro.layers.convert_to_fixed_point(model, 8)
    lro.layers.calibrate_fixed_point(model, run, X, 8 * X, rule="max")
    exact = lambda x: x @ layer.kernel[...] + layer.bias[...]
    seen = jnp.concatenate([X, exact(X), 8 * X, exact(8 * X)])
    expected = lro.layers.choose_integer_bits(seen, FixedPointFormat(8), "max")
    assert layer.input_quantizer.integer_bits[...] == expected
    made = jnp.concatenate([exact(x) for x in (X, exact(X), 8 * X, exact(8 * X))])
    expected = lro.layers.choose_integer_bits(made, FixedPointFormat(8), "max")
    assert layer.output_quantizer.integer_bits[...] == expected


def test_a_half_precision_model_gives_the_numbers_of_a_float32_one() -> None:
    half = Network(nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = Network(nnx.Rngs(0), param_dtype=jnp.bfloat16, dtype=jnp.float32)
    x = X.astype(jnp.bfloat16)
    for each in (half, model):
        lro.layers.convert_to_fixed_point(each, 8, "up")
        lro.layers.calibrate_fixed_point(each, lambda m, x: m.up(x), x)
    y = half.up(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), model.up(x))
    # Steps of 1/8: a little below the tie 1.0625, which bfloat16 would make of the sum.
    add, term = lro.layers.FixedPointSum(), lambda x: jnp.array([x], jnp.bfloat16)
    add.output_quantizer = lro.layers.FixedPointQuantizer(FixedPointFormat(5), 2.0)
    assert add(term(1.0625), term(-(2**-11))).tolist() == [1.0]
    sums = LayerFormats(output=None)
    lro.layers.convert_to_fixed_point(half, sums, "up")
    with pytest.raises(ValueError, match="the exact sum on, which bfloat16 does not hold"):
        lro.layers.calibrate_fixed_point(half, lambda m, x: m.up(x), x)
    lro.layers.convert_to_fixed_point(half, 10, "up")
    with pytest.raises(ValueError, match=r"the output is bfloat16, which holds .* 9 bits"):
        lro.layers.calibrate_fixed_point(half, lambda m, x: m.up(x), x)


@pytest.mark.full  # three programs of a decoder; the main job's test trains one, too
def test_a_scanned_and_rematerialized_decoder_has_points_per_layer_and_generates() -> None:
    config = decoder_config("llama-tiny", vocab_size=64)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = dataclasses.replace(config, **sizes, num_attention_heads=2, num_key_value_heads=1)
    model = Decoder(config, rngs=nnx.Rngs(0), remat="full")
    exact = model(TOKENS)
    summary = lro.layers.convert_to_fixed_point(model, 8)
    assert len(summary.rows) == 7
    lro.layers.calibrate_fixed_point(model, run, TOKENS)
    assert model.blocks.mlp.down.input_quantizer.integer_bits.shape == (2,)
    assert jnp.linalg.norm(model(TOKENS) - exact) < 0.1 * jnp.linalg.norm(exact)
    by_point = nnx.jit(nnx.grad(lambda model: model(TOKENS).var()))(model)["blocks"]["mlp"]["up"]
    assert (by_point["output_quantizer"]["integer_bits"][...] != 0).all()
    tokens = generate(model, TOKENS[:, :4], 3, key=jax.random.key(0))
    assert tokens.shape == (2, 7)


def test_a_sharded_batch_gives_the_same_gradients(in_eight_bits: Any) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shared_out = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
    graphdef, params = nnx.split(in_eight_bits)
    gradient = jax.jit(jax.grad(lambda p, x: (nnx.merge(graphdef, p)(x) ** 2).sum()))
    assert_close(nnx.as_pure(gradient(params, shared_out)), nnx.as_pure(gradient(params, X)), 200)


def test_models_pickle_and_take_lora(in_eight_bits: Any) -> None:
    again = pickle.loads(pickle.dumps(in_eight_bits))
    np.testing.assert_array_equal(again(X), in_eight_bits(X))
    model = copy.deepcopy(in_eight_bits)
    lro.adapters.attach(model, lro.adapters.LoRA(rank=2), where="up", rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(X), in_eight_bits(X))  # it starts at zero
    with pytest.raises(ValueError, match=r"up is more than .* \(it has adapters\)"):
        lro.layers.convert_to_fixed_point(model, 4, "up")


class Doubled(nnx.Linear):
    """A layer with a call of its own."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return 2 * super().__call__(inputs, out_sharding)


def test_layers_and_options_that_are_refused() -> None:
    convert = lro.layers.convert_to_fixed_point
    rngs = nnx.Rngs(0)
    one = lambda layer: nnx.Sequential(layer)
    infinite = nnx.Linear(2, 2, rngs=rngs)
    infinite.kernel[...] = jnp.full((2, 2), jnp.inf)
    masked = nnx.Conv(2, 2, (3,), mask=jnp.ones((3, 2, 2)), rngs=rngs)
    own = nnx.Linear(2, 2, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), rngs=rngs)
    for layer, formats, options, error, message in (
        (nnx.Linear(2, 2, rngs=rngs), 0, {}, ValueError, "bits=0 must be 1 to 53"),
        (nnx.Linear(2, 2, rngs=rngs), 25, {}, ValueError, "24 bits at most, not of 25"),
        (nnx.Linear(2, 2, rngs=rngs), 8.0, {}, TypeError, "formats=8.0 must be a number of bits"),
        (nnx.Linear(2, 2, rngs=rngs), 8, {"where": "conv"}, ValueError, "conv"),
        (nnx.Linear(2, 2, rngs=rngs), 8, {"rule": "best"}, ValueError, "rule='best'"),
        (Doubled(2, 2, rngs=rngs), 8, {}, ValueError, "it has a call of its own, of Doubled"),
        (own, 8, {}, ValueError, "layers/0 .* its own dot_general"),
        (masked, 8, {}, ValueError, "layers/0 .* its own mask"),
        (nnx.BatchNorm(2, axis=1, rngs=rngs), 8, {}, ValueError, "normalizes along axis 1"),
        (infinite, 8, {}, ValueError, "the kernel of layers/0: x has numbers that are not finite"),
    ):
        with pytest.raises(error, match=message):
            convert(one(layer), formats, **options)
    with pytest.raises(TypeError, match="weight=8 must be a FixedPointFormat"):
        LayerFormats(weight=8)
    with pytest.raises(TypeError, match="weight=None must be a FixedPointFormat"):
        LayerFormats(weight=None)


def test_calibrations_and_calls_that_are_refused(in_eight_bits: Any) -> None:
    calibrate, freeze = lro.layers.calibrate_fixed_point, lro.layers.freeze_binary_points
    fresh = Network(nnx.Rngs(0))
    for use in (lambda: calibrate(fresh, run, X), lambda: freeze(fresh, run)):
        with pytest.raises(ValueError, match="Network has no fixed-point layer"):
            use()
    before = in_eight_bits.up.output_quantizer.integer_bits[...]
    with pytest.raises(ValueError, match="the loss is nan"):
        freeze(in_eight_bits, lambda model: jnp.nan * model(X).sum())
    assert type(in_eight_bits.up.output_quantizer.integer_bits) is BinaryPoint
    assert in_eight_bits.up.output_quantizer.integer_bits[...] == before
    lro.layers.convert_to_fixed_point(fresh, 8)
    with pytest.raises(ValueError, match="integer_bits must be finite, not nan: choose it"):
        fresh(X)
    with pytest.raises(ValueError, match=r"integer_bits of .*_quantizer is not finite"):
        freeze(fresh, run)
    for run_, batches, message in (
        (run, (), "batches is empty"),
        (lambda m, x: m.up(x), (X,), "does not call the quantizer (norm|down)/"),
        (run, (X.at[0, 0].set(jnp.inf),), "has numbers that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(fresh, run_, *batches)
        # Nothing is set, and the model is no longer in calibration.
        assert np.isnan(fresh.up.input_quantizer.integer_bits[...])
        assert fresh.up.input_quantizer.statistics is None
    with pytest.raises(ValueError, match="rule='best'"):
        calibrate(in_eight_bits, run, X, rule="best")
