"""The noise of a model's randomized layers, measured in its own backward pass."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import nnx

import lowrank_optax as lro
from lowrank_optax.layers import Sketch, choose_sketches, randomize, sketch_noise
from lowrank_optax.models import Decoder, decoder_config

X = np.random.default_rng(0).standard_normal((4, 8, 3), np.float32)
T = np.random.default_rng(1).standard_normal((4, 8, 2), np.float32)


class Net(nnx.Module):
    """Two layers, and one that is not called."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(3, 5, rngs=rngs)
        self.down = nnx.Linear(5, 2, rngs=rngs)
        self.idle = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.tanh(self.up(x)))


def net(sketch: Any) -> Net:
    model = Net()
    randomize(model, sketch, rngs=1)
    return model


def loss(model: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.mean((model(x) - t) ** 2)


def by_hand(model: Net) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Inputs and cotangents of the outputs of both layers, in float64."""
    f64 = lambda x: np.asarray(x, np.float64)
    x, t = (f64(v).reshape(32, -1) for v in (X, T))
    hidden = np.tanh(x @ f64(model.up.kernel[...]) + f64(model.up.bias[...]))
    out = hidden @ f64(model.down.kernel[...]) + f64(model.down.bias[...])
    of_out = 2 * (out - t) / t.size
    of_up = (of_out @ f64(model.down.kernel[...]).T) * (1 - hidden**2)
    return {"up": (x, of_up), "down": (hidden, of_out)}


def variances(x: np.ndarray, y: np.ndarray, p: int) -> dict[str, float]:
    """The variances by their definitions, from all outer products."""
    count = len(x)
    outer = np.einsum("bn,bm->bnm", x, y)
    spread = outer - outer.mean(0)
    sample = (spread**2).sum() / (count - 1)
    pairs = np.einsum("in,jm->ijnm", x, y)
    pairs = pairs + pairs.swapaxes(0, 1)  # of i and j, which occur together in SSᵀ
    above = pairs[np.triu_indices(count, 1)]
    strata = outer.reshape(p, count // p, -1)
    within = (strata - strata.mean(1, keepdims=True)) ** 2
    return {
        "rows": count**2 * sample / p * (1 - p / count),  # a sample without replacement
        "rademacher": (above**2).sum() / p,
        "gaussian": ((above**2).sum() + 2 * (outer**2).sum()) / p,
        "stratified": (count // p) * within.sum(),
        "minibatch": count * sample,
    }


@pytest.mark.parametrize("kind", ["rows", "stratified", "rademacher", "gaussian"])
def test_figures_are_those_of_the_definitions_in_float64(kind: Any) -> None:
    model = net(Sketch(kind, fraction=0.25))
    noise = sketch_noise(model, loss, X, T)
    assert list(noise) == ["down", "up"]  # `idle` is not called
    for path, (x, y) in by_hand(model).items():
        figures, expected = noise[path], variances(x, y, 8)
        assert (figures.rows, figures.size) == (32, 8)
        assert_close(figures.variance, expected[kind], 100, dtype=np.float32)
        assert_close(figures.minibatch_variance, expected["minibatch"], 100, dtype=np.float32)
        ratio = expected[kind] / expected["minibatch"]
        assert_close(figures.ratio, ratio, 100, dtype=np.float32)
        alignment = np.sum((x.T @ y) ** 2) / np.sum(x**2) / np.sum(y**2)
        assert_close(figures.alignment, alignment, 100, dtype=np.float32)


@pytest.mark.slow
def test_the_variance_is_that_of_the_gradients_that_are_drawn() -> None:
    model = net({"down": Sketch("stratified", size=8)})
    figures = sketch_noise(model, loss, X, T)["down"]
    exact = nnx.jit(nnx.grad(loss))(nnx.view(model, deterministic=True), X, T).down.kernel[...]
    graphdef, keys, rest = nnx.split(model, nnx.RngKey, ...)

    def squared_error(key: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda _: key, keys)
        drawn = nnx.grad(loss)(nnx.merge(graphdef, own, rest, copy=True), X, T).down.kernel[...]
        return jnp.sum((drawn - exact) ** 2)

    errors = jax.jit(jax.vmap(squared_error))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(figures.variance, np.mean(errors), rtol=0.05)


@pytest.mark.parametrize("kind", ["rows", "gaussian", "rademacher", "norm_weighted", "dct"])
def test_the_wanted_size_is_the_least_that_brings_the_ratio(kind: Any) -> None:
    ratio = lambda size: sketch_noise(net({"down": Sketch(kind, size=size)}), loss, X, T)["down"]
    target = 4.0
    found = sketch_noise(net({"down": Sketch(kind, size=3)}), loss, X, T, noise_ratio=target)
    wanted = int(found["down"].wanted_size)
    assert 1 < wanted < 32
    assert ratio(wanted).ratio <= target * (1 + 1e-4)
    assert ratio(wanted - 1).ratio > target


def test_a_sketch_of_all_rows_adds_nothing() -> None:
    noise = sketch_noise(net(Sketch("rows", fraction=1.0)), loss, X, T)["up"]
    assert (noise.variance, noise.ratio, noise.wanted_size) == (0, 0, 32)
    assert noise.minibatch_variance > 0


def decoder(**options: Any) -> Decoder:
    config = decoder_config(
        "llama-tiny",
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = Decoder(config, rngs=nnx.Rngs(0), **options)
    randomize(model, Sketch("rows", fraction=0.25), where="mlp/(up|down)", rngs=1)
    return model


@pytest.mark.slow
def test_layers_of_a_scan_have_figures_each_and_the_model_stays_as_it_is() -> None:
    tokens = np.arange(16).reshape(2, 8)
    mean = lambda model, tokens: (jnp.mean(model(tokens)[..., 3] ** 2), "more")
    stacked, unrolled = decoder(remat="full"), decoder(scan_layers=False)
    for name in ("embed", "norm", "lm_head"):
        nnx.update(getattr(unrolled, name), nnx.state(getattr(stacked, name), nnx.Param))
    for i, block in enumerate(unrolled.blocks):
        layers = nnx.state(stacked.blocks, nnx.Param)
        nnx.update(block, jax.tree.map(lambda x, i=i: x[i], layers))
    graphdef, state = nnx.split(stacked)
    found = sketch_noise(stacked, mean, tokens, has_aux=True)
    after, left = nnx.split(stacked)
    assert after == graphdef
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(left), strict=True):
        assert before is now  # neither weights nor streams
    each = sketch_noise(unrolled, mean, tokens, has_aux=True)
    for name in ("up", "down"):
        for field, values in found[f"blocks/mlp/{name}"]._asdict().items():
            expected = [getattr(each[f"blocks/{i}/mlp/{name}"], field) for i in range(2)]
            np.testing.assert_allclose(values, expected, rtol=1e-3)


def test_of_a_layer_called_twice_variances_are_sums() -> None:
    once = net({"down": Sketch("rows", size=8)})
    double = lambda model, x, t: loss(model, x, t) + loss(model, x, t)
    one, two = (sketch_noise(once, f, X, T)["down"] for f in (loss, double))
    assert_close(two.variance, 2 * one.variance, 100, dtype=np.float32)
    expected = 2 * one.minibatch_variance
    assert_close(two.minibatch_variance, expected, 100, dtype=np.float32)
    assert (two.rows, two.size, two.wanted_size) == (one.rows, one.size, one.wanted_size)
    assert_close(two.alignment, one.alignment, 100, dtype=np.float32)


def test_rows_that_are_not_valid_count_as_zeros() -> None:
    layer = lro.layers.RandomizedLinear(3, 2, sketch=Sketch("rows", size=8), rngs=nnx.Rngs(0))
    valid = np.arange(32).reshape(4, 8) % 3 > 0
    masked = lambda layer, x: jnp.sum(
        jnp.where(valid[..., None], layer(x, valid=valid) - T, 0) ** 2
    )
    found = sketch_noise(layer, masked, X)[""]
    kernel, bias = (np.asarray(part[...], np.float64) for part in (layer.kernel, layer.bias))
    y = 2 * (X @ kernel + bias - T) * valid[..., None]
    x = X.astype(np.float64) * valid[..., None]
    expected = variances(x.reshape(32, 3), y.reshape(32, 2), 8)["rows"]
    assert_close(found.variance, expected, 100, dtype=np.float32)


def test_measured_again_nothing_is_compiled() -> None:
    traces = []

    def counted(model: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        traces.append(1)
        return loss(model, x, t)

    model = net(Sketch("rows", fraction=0.25))
    before = sketch_noise(model, counted, X, T)["up"].variance
    model.up.kernel[...] = 2 * model.up.kernel[...]
    assert sketch_noise(model, counted, X, T)["up"].variance != before
    assert len(traces) == 1


def test_sizes_chosen_are_the_largest_wanted_and_fit_randomize() -> None:
    model = net({"up": Sketch("rows", fraction=0.25), "down": Sketch("gaussian", size=4)})
    noises = [sketch_noise(model, loss, scale * X, T, noise_ratio=3.0) for scale in (1, 3)]
    sketches = choose_sketches(model, *noises)
    assert sketches["^up$"] == Sketch("rows", size=8)  # 32 / (1 + 3), of any batch
    wanted = max(int(noise["down"].wanted_size) for noise in noises)
    assert sketches["^down$"] == Sketch("gaussian", size=wanted)
    randomize(model, sketches, rngs=1)
    assert model.down.sketch.size == wanted


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer of the model is randomized"):
        sketch_noise(Net(), loss, X, T)
    model = net(Sketch("rows", fraction=0.25))
    with pytest.raises(ValueError, match="noise_ratio=0 must be above 0"):
        sketch_noise(model, loss, X, T, noise_ratio=0)
    with pytest.raises(ValueError, match="no noise was measured"):
        choose_sketches(model)
    noise = sketch_noise(model, loss, X, T)
    with pytest.raises(ValueError, match="'up', which is not a randomized layer"):
        choose_sketches(net({"down": Sketch("rows", size=3)}), {"up": noise["up"]})


def test_a_layer_with_its_own_call_is_refused() -> None:
    class WithOffset(lro.layers.RandomizedLinear):
        def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
            return super().__call__(*args, **kwargs) + 1

    layer = WithOffset(3, 2, sketch=Sketch("rows", fraction=0.25), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layers/0 has a call of its own, of WithOffset"):
        sketch_noise(nnx.Sequential(layer), loss, X, T)
