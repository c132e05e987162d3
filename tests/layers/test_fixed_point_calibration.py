"""Calibration of models of other kinds, and calls that fail: the model is then as it was."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import nnx

import lowrank_optax as lro
from lowrank_optax.layers import BinaryPoint, FixedPointFormat, LayerFormats

X = jnp.asarray(np.random.default_rng(0).normal(size=(64, 6)), jnp.float32)
EIGHT, RELU = FixedPointFormat(8), FixedPointFormat(8, signed=False)

run = lambda model, x: model(x)
exact = lambda layer, x: x @ layer.kernel[...] + layer.bias[...]


def point(x: jax.Array, format: FixedPointFormat = EIGHT) -> float:
    return float(lro.layers.choose_integer_bits(x, format, "max"))


@pytest.mark.parametrize("of_input", [False, True])
def test_layers_after_a_format_with_a_relu_are_calibrated_behind_it(of_input: bool) -> None:
    model = nnx.Sequential(*(nnx.Linear(6, 6, rngs=nnx.Rngs(i)) for i in range(2)))
    first, second = model.layers
    second.bias[...] = jnp.full(6, 0.25)
    name = "input" if of_input else "output"
    lro.layers.convert_to_fixed_point(model, LayerFormats(**{name: RELU}), "0")
    lro.layers.convert_to_fixed_point(model, 8, "1")
    # Far below zero: a layer that sees it has another range.
    shifted = X - 20
    first.bias[...] = jnp.full(6, -30.0 if not of_input else 0.0)
    lro.layers.calibrate_fixed_point(model, run, shifted, X, rule="max")
    both = jnp.concatenate([shifted, X])
    hidden = exact(first, jnp.maximum(both, 0)) if of_input else jnp.maximum(exact(first, both), 0)
    output = exact(second, hidden)
    assert second.input_quantizer.integer_bits[...] == point(hidden)
    assert second.output_quantizer.integer_bits[...] == point(output)
    if of_input:
        assert first.output_quantizer.integer_bits[...] == point(hidden)
        assert point(exact(first, both)) > point(hidden)


def test_a_model_that_scans_its_layers_by_nnx_is_calibrated() -> None:
    class Stack(nnx.Module):
        def __init__(self) -> None:
            make = nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs))
            self.layer = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layer, x)

    model = Stack()
    lro.layers.convert_to_fixed_point(model, 8)
    lro.layers.calibrate_fixed_point(model, run, X, rule="max")
    seen = [X]
    for kernel, bias in zip(model.layer.kernel[...], model.layer.bias[...], strict=True):
        seen.append(seen[-1] @ kernel + bias)
    found = model.layer.input_quantizer.integer_bits[...].tolist()
    assert found == [point(x) for x in seen[:-1]]
    model.layer.output_quantizer.integer_bits[...] += 0.4
    lro.layers.freeze_binary_points(model, lambda model: model(X).var())
    assert model.layer.input_quantizer.integer_bits[...].tolist() == found


def test_a_conversion_that_is_refused_changes_no_layer() -> None:
    broken = nnx.Linear(6, 6, rngs=nnx.Rngs(1))
    broken.bias[...] = jnp.full(6, jnp.nan)
    norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0), use_running_average=True)
    model = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), norm, broken)
    with pytest.raises(ValueError, match="the bias of layers/2: x has numbers that are not finite"):
        lro.layers.convert_to_fixed_point(model, 8)
    assert [type(layer) for layer in model.layers] == [nnx.Linear, nnx.BatchNorm, nnx.Linear]
    assert nnx.state(model, nnx.BatchStat)
    broken.bias[...] = jnp.zeros(6)
    expected = model(X)
    lro.layers.convert_to_fixed_point(model, 16)
    lro.layers.calibrate_fixed_point(model, run, X)
    assert float(jnp.abs(model(X) - expected).max()) < 1e-3


def test_a_loss_that_fails_leaves_the_points_trainable() -> None:
    model = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(0)))
    lro.layers.convert_to_fixed_point(model, 8)
    lro.layers.calibrate_fixed_point(model, run, X)
    before = jax.tree.leaves(nnx.state(model, BinaryPoint))
    for loss, error in (
        (lambda model: model(X), TypeError),
        (lambda m: m(X).sum() / 0, ValueError),
    ):
        with pytest.raises(error):
            lro.layers.freeze_binary_points(model, loss)
        assert jax.tree.leaves(nnx.state(model, BinaryPoint)) == before


def test_stacks_along_another_axis_and_formats_of_quantizers_that_are_refused() -> None:
    def stacked(axis: int) -> Any:
        make = nnx.vmap(lambda rngs: nnx.Linear(6, 4, rngs=rngs), out_axes=axis)
        return nnx.Sequential(nnx.split_rngs(splits=3)(make)(nnx.Rngs(0)))

    lro.layers.convert_to_fixed_point(stacked(0), 8)
    with pytest.raises(ValueError, match=r"layers/0 has shape \(6, 3, 4\), and one layer has"):
        lro.layers.convert_to_fixed_point(stacked(1), 8)
    with pytest.raises(TypeError, match="format=8 must be a FixedPointFormat"):
        lro.layers.FixedPointQuantizer(8)
