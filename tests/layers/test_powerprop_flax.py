"""The Flax layers start as the plain ones, and train as the map of trees does."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")

from flax import linen as nn
from flax import nnx

import lowrank_optax as lro

X = np.random.default_rng(0).standard_normal((5, 3), np.float32)
ALPHAS = (1.0, 1.3, 2.0, 4.0)


class Network(nnx.Module):
    """A convolution with statistics and dropout behind it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(2, 3, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.dropout(self.norm(self.conv(x))))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_nnx_linear_starts_as_the_plain_layer_and_has_the_gradients_of_the_formula(
    alpha: float,
) -> None:
    plain = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    layer = lro.layers.PowerpropLinear(3, 4, alpha=alpha, rngs=nnx.Rngs(0))
    loss = lambda layer: jnp.sum(layer(X) ** 2)
    both = nnx.jit(lambda layer: (layer(X), nnx.grad(loss)(layer)))
    (outputs, gradient), (expected, reference) = both(layer), both(plain)
    assert_close(outputs, expected, 100)
    assert_close(layer.effective_kernel(), plain.kernel[...], 100)
    theta = np.asarray(layer.kernel[...], np.float64)
    expected = alpha * np.abs(theta) ** (alpha - 1) * reference["kernel"][...]
    assert_close(gradient["kernel"][...], expected, 100, dtype=np.float32)
    assert_close(gradient["bias"][...], reference["bias"][...], 100)


def train(layer: Any, steps: int = 5) -> Any:
    optimizer = nnx.Optimizer(layer, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(layer: Any, optimizer: nnx.Optimizer) -> None:
        optimizer.update(layer, nnx.grad(lambda layer: jnp.mean((layer(X) - 1) ** 2))(layer))

    for _ in range(steps):
        step(layer, optimizer)
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def test_nnx_linear_with_exponent_one_is_the_plain_layer() -> None:
    layer = lro.layers.PowerpropLinear(3, 4, alpha=1.0, rngs=nnx.Rngs(0))
    plain = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.kernel[...], plain.kernel[...])
    np.testing.assert_array_equal(layer.effective_kernel(), plain.kernel[...])
    assert_close(train(layer), train(plain), 100)


def test_nnx_linear_takes_the_options_of_linear_and_changes_its_exponent() -> None:
    layer = lro.layers.PowerpropLinear(
        3, 4, alpha=1.5, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    before, kernel = layer.effective_kernel(), layer.kernel[...]
    assert layer(X).dtype == jnp.bfloat16
    assert layer.bias is None
    layer.change_alpha(3.0)
    assert layer.alpha == 3.0
    assert not np.allclose(layer.kernel[...], kernel)
    assert_close(layer.effective_kernel(), before, 100)
    specs = lro.weight_dimension_numbers(nnx.Sequential(layer))
    assert jax.tree.leaves(specs, is_leaf=lambda s: hasattr(s, "reduction_axis"))[0] is not None


def test_nnx_layers_refuse_zeros_and_small_exponents() -> None:
    zeros = nnx.initializers.zeros_init()
    with pytest.raises(ValueError, match="kernel: all weights are zero"):
        lro.layers.PowerpropLinear(3, 4, alpha=2.0, kernel_init=zeros, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"alpha=0\.5"):
        lro.layers.PowerpropLinear(3, 4, alpha=0.5, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_stacked_nnx_layers_run_in_a_scan() -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> Any:
        return lro.layers.PowerpropLinear(3, 3, alpha=1.7, rngs=rngs)

    layers = create(nnx.Rngs(0).split(2))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x: jax.Array, layer: Any) -> jax.Array:
        return layer(x)

    weights = lro.layers.powerprop(nnx.to_pure_dict(nnx.state(layers)), 1.7, "kernel")["kernel"]
    assert weights.shape == (2, 3, 3)
    np.testing.assert_allclose(run(X, layers), X @ weights[0] @ weights[1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_any_nnx_module_is_wrapped_and_its_other_variables_change_as_ever() -> None:
    x = np.random.default_rng(1).standard_normal((4, 6, 2), np.float32)
    plain, inside = Network(nnx.Rngs(0)), Network(nnx.Rngs(0))
    wrapped = lro.layers.PowerpropModule(inside, 2.0)
    call = nnx.jit(lambda module, x: module(x))
    for _ in range(2):  # dropout moves on, statistics gather
        np.testing.assert_allclose(call(wrapped, x), call(plain, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(inside.norm.mean[...], plain.norm.mean[...], rtol=1e-4, atol=1e-6)
    assert inside.norm.mean[...].any()
    kernel = plain.conv.kernel[...]
    theta = np.sign(kernel) * np.sqrt(np.abs(kernel))
    assert_close(inside.conv.kernel[...], theta, 100)
    np.testing.assert_array_equal(inside.norm.scale[...], plain.norm.scale[...])
    gradients = nnx.jit(nnx.grad(lambda module: jnp.sum(module(x) ** 2)))(wrapped)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_a_wrapped_nnx_module_changes_its_exponent_and_is_exported() -> None:
    plain = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    outputs = plain(X)
    wrapped = lro.layers.PowerpropModule(plain, 1.5)
    wrapped.change_alpha(3.0)
    np.testing.assert_allclose(wrapped(X), outputs, rtol=1e-4, atol=1e-6)
    exported = wrapped.export()
    assert type(exported) is nnx.Linear
    np.testing.assert_allclose(exported(X), outputs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_linen_dense_starts_as_the_plain_layer_and_has_the_gradients_of_the_formula(
    alpha: float,
) -> None:
    layer, plain = lro.layers.linen.PowerpropDense(4, alpha=alpha), nn.Dense(4)
    variables, reference = (jax.jit(m.init)(jax.random.key(0), X) for m in (layer, plain))
    outputs, expected = jax.jit(lambda v, r: (layer.apply(v, X), plain.apply(r, X)))(
        variables, reference
    )
    assert_close(outputs, expected, 100)
    if alpha == 1:
        assert_close(variables, reference)
    loss = lambda variables, module: jnp.sum(module.apply(variables, X) ** 2)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)(variables, layer)["params"]
    theta = np.asarray(variables["params"]["kernel"], np.float64)
    slope = alpha * np.abs(theta) ** (alpha - 1)
    plain_gradient = jax.jit(jax.grad(loss), static_argnums=1)(reference, plain)["params"]["kernel"]
    assert_close(gradient["kernel"], slope * plain_gradient, 100, dtype=np.float32)


class Block(nn.Module):
    """A layer as `nn.scan` takes it."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return lro.layers.linen.PowerpropDense(3, alpha=1.7, use_bias=False)(x), None


def test_stacked_linen_layers_run_in_a_scan() -> None:
    split = {"params": True}
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs=split, length=2)()
    variables = jax.jit(lambda: stack.init(jax.random.key(0), X, None))()
    theta = variables["params"]["PowerpropDense_0"]["kernel"]
    weights = lro.layers.powerprop({"kernel": theta}, 1.7, "kernel")["kernel"]
    outputs, _ = jax.jit(lambda v: stack.apply(v, X, None))(variables)
    np.testing.assert_allclose(outputs, X @ weights[0] @ weights[1], rtol=1e-4, atol=1e-6)


class LinenNetwork(nn.Module):
    """A convolution with statistics behind it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(3, (3,))(x))
        return nn.Dense(4)(x)


def test_any_linen_module_is_wrapped_and_its_statistics_change_as_ever() -> None:
    x = np.random.default_rng(1).standard_normal((4, 6, 2), np.float32)
    plain = LinenNetwork()
    wrapped = lro.layers.linen.PowerpropModule(LinenNetwork(), 2.0)
    reference = jax.jit(plain.init)(jax.random.key(0), x)
    theta = jax.jit(lambda p: lro.layers.powerprop_inverse(p, 2.0))(reference["params"])
    drawn = jax.eval_shape(wrapped.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, drawn["params"]) == {"module": jax.tree.map(jnp.shape, theta)}
    variables = {
        "params": {"module": theta},
        "batch_stats": {"module": reference["batch_stats"]},
    }
    run = lambda module, v: jax.jit(lambda v: module.apply(v, x, mutable="batch_stats"))(v)
    outputs, after = run(wrapped, variables)
    expected, expected_after = run(plain, reference)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        after["batch_stats"]["module"],
        expected_after["batch_stats"],
    )


def test_a_wrapped_linen_module_starts_as_the_plain_one_would() -> None:
    wrapped = lro.layers.linen.PowerpropModule(nn.Dense(4), 2.0)
    variables = jax.jit(wrapped.init)(jax.random.key(0), X)
    weights = jax.jit(lambda p: lro.layers.powerprop(p, 2.0))(variables["params"]["module"])
    expected = X @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])
    assert_close(jax.jit(wrapped.apply)(variables, X), expected, 100)
    # As large as lecun_normal draws them, not as their roots would be.
    assert 0.2 < float(jnp.std(weights["kernel"])) < 1.2


def test_pruned_weights_and_powerprop_work_in_an_nnx_optimizer() -> None:
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    masks = lro.layers.magnitude_masks(nnx.state(model, nnx.Param), 0.5)
    nnx.update(model, lro.layers.apply_masks(nnx.state(model, nnx.Param), masks))
    pruned = model.kernel[...] == 0
    inner = lro.layers.powerprop_updates(optax.adam(0.05), 1.5)
    optimizer = nnx.Optimizer(model, lro.layers.mask_updates(inner, masks), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(X) - 1) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [step(model, optimizer) for _ in range(30)]
    assert losses[-1] < losses[0] / 2
    np.testing.assert_array_equal(model.kernel[...] == 0, pruned)
    assert int(pruned.sum()) == 6


class Frozen(nnx.Variable):
    """A parameter that is not trained."""


@pytest.mark.parametrize("names", [("kernel",), ("kernel", "bias")])
def test_a_linear_layer_with_frozen_variables_computes_the_same(names: tuple[str, ...]) -> None:
    layer = lro.layers.PowerpropLinear(3, 4, alpha=2.0, rngs=nnx.Rngs(0))
    expected = layer(X)
    for name in names:
        setattr(layer, name, Frozen(getattr(layer, name)[...]))
    assert_close(layer(X), expected)
    layer.change_alpha(3.0)
    assert isinstance(layer.kernel, Frozen)
    assert_close(layer(X), expected, 100)


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_a_wrapped_module_with_frozen_variables_computes_the_same(names: tuple[str, ...]) -> None:
    module = nnx.Dict(a=nnx.Linear(3, 3, rngs=nnx.Rngs(0)), b=nnx.Linear(3, 4, rngs=nnx.Rngs(1)))
    model = Chain(module)
    expected = model(X)
    wrapped = lro.layers.PowerpropModule(model, 2.0)
    assert wrapped.paths == ("layers/a/kernel", "layers/b/kernel")
    assert_close(wrapped(X), expected, 100)
    for name in names:
        for parameter in ("kernel", "bias"):
            setattr(module[name], parameter, Frozen(getattr(module[name], parameter)[...]))
    assert_close(wrapped(X), expected, 100)
    wrapped.change_alpha(3.0)
    assert isinstance(module.a.kernel, Frozen)
    assert_close(wrapped(X), expected, 100)
    assert_close(wrapped.export()(X), expected, 100)


class Chain(nnx.Module):
    """Two layers."""

    def __init__(self, layers: Any) -> None:
        self.layers = layers

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers.b(self.layers.a(x))


def test_parameters_added_to_a_wrapped_module_are_used_as_they_are() -> None:
    wrapped = lro.layers.PowerpropModule(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), 2.0, "kernel|later")
    expected = wrapped(X)
    wrapped.module.later = nnx.Param(jnp.full((2, 2), 3.0))
    assert_close(wrapped(X), expected)
    wrapped.change_alpha(4.0)
    np.testing.assert_array_equal(wrapped.module.later[...], 3)


def test_a_wrapped_module_without_its_parameters_is_refused() -> None:
    frozen = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    for name in ("kernel", "bias"):
        setattr(frozen, name, Frozen(getattr(frozen, name)[...]))
    with pytest.raises(ValueError, match=r"Linear has no nnx\.Param"):
        lro.layers.PowerpropModule(frozen, 2.0)
    wrapped = lro.layers.PowerpropModule(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), 2.0)
    uses = (lambda: wrapped(X), wrapped.export, lambda: wrapped.change_alpha(3.0))
    for kernel in (Frozen(jnp.ones((3, 4), jnp.int8)), None):
        wrapped.module.kernel = kernel
        for use in uses:
            with pytest.raises(ValueError, match=r"kernel are no longer .* in the Linear"):
                use()
