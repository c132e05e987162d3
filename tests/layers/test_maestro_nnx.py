"""Maestro layers in NNX: calls, ranks that are sampled and fall, and what they compose with."""

import functools
import pickle
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
from layers.maestro_net import X, linear, net
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.layers import MaestroConv, MaestroLinear, maestro

IMAGES = np.random.default_rng(1).standard_normal((2, 9, 9, 2), np.float32)


def test_start_is_the_spectral_split_of_a_plain_layer_of_the_same_key() -> None:
    layer, plain = linear(), nnx.Linear(8, 12, rngs=nnx.Rngs(0))
    a, b = layer.factors()
    assert_close(a @ b, plain.kernel[...], 100)
    singular = np.linalg.svd(plain.kernel[...], compute_uv=False)
    assert_close(a.T @ a, np.diag(singular), 100)
    assert_close(b @ b.T, np.diag(singular), 100)
    assert_close(layer(X), X @ plain.kernel[...] + np.arange(12, dtype=np.float32), 100)
    assert MaestroLinear(8, 12, 3, use_bias=False, rngs=nnx.Rngs(0)).width() == 3


def test_a_split_in_float64_is_exact() -> None:
    with jax.enable_x64(True):
        plain = nnx.Linear(8, 12, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        layer, x = MaestroLinear.from_linear(plain), jnp.asarray(X, jnp.float64)

        @jax.jit
        def outputs(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            masked = jax.vmap(lambda k: layer(x, rank=k))(jnp.arange(9))
            return masked, jnp.stack([layer(x, rank=k) for k in range(9)])

        masked, sliced = outputs(x)
        np.testing.assert_allclose(masked[8], plain(x), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(masked, sliced, rtol=1e-12, atol=1e-12)


def test_rank_of_a_call_is_that_given_else_the_sampled_else_the_current() -> None:
    layer = linear()
    a, b = layer.factors()
    expected = lambda k: X @ a[:, :k] @ b[:k] + np.arange(12)
    layer.rank[...] = 5
    assert_close(layer(X), expected(5))
    maestro.set_ranks(layer, {"": 3})
    assert_close(layer(X), expected(3))
    for rank in (2, jnp.array(2)):
        assert_close(layer(X, rank=rank), expected(2))
    assert int(layer.rank[...]) == 5
    assert_close(maestro.set_ranks(layer, None)(X), expected(5))
    for rank in (0, jnp.array(0), jnp.array(-3)):
        assert_close(layer(X[None], rank=rank), np.broadcast_to(np.arange(12.0), (1, 3, 12)))
    assert_close(layer(X, rank=jnp.array(99)), expected(8))


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 2, "padding": "VALID"},
        pytest.param({"kernel_dilation": 2}, marks=pytest.mark.full),
        pytest.param({"padding": ((1, 2), (0, 1)), "input_dilation": 2}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_convolution_is_the_plain_one_of_the_product(options: dict[str, Any]) -> None:
    plain = nnx.Conv(2, 7, (3, 2), rngs=nnx.Rngs(0), **options)
    plain.bias[...] = jnp.arange(7.0)
    layer = MaestroConv.from_conv(plain)
    assert layer.width() == 7
    expected = plain(IMAGES)
    assert_close(layer(IMAGES), expected, 100)
    a, b = layer.factors()
    assert a.shape == (12, 7)
    plain.kernel[...] = (a[:, :2] @ b[:2]).reshape(3, 2, 2, 7)
    for rank in (2, jnp.array(2)):
        assert_close(layer(IMAGES, rank=rank), plain(IMAGES), 100)
    layer.rank[...] = 0
    assert_close(layer(IMAGES), np.broadcast_to(np.arange(7.0), expected.shape))
    layer.rank[...] = 2
    merged = maestro.merge(layer)
    assert type(merged) is nnx.Conv
    assert_close(merged(IMAGES), plain(IMAGES), 100)


def test_ranks_and_calls_that_cannot_be_are_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match="ranks has 'block', which is no Maestro layer; near it"):
        maestro.set_ranks(model, {"block": 1})
    for ranks, message in (
        ({"blocks": 1}, r"ranks\['blocks'\] has shape \(\) and must have \(3,\)"),
        ({"blocks": np.array([1.0, 2, 3])}, r"ranks\['blocks'\]=.* must be an integer"),
        ({"out": 0.5}, r"ranks\['out'\]=0.5 must be an integer, a number of directions"),
        ({"out": 9}, r"ranks\['out'\]=9 must be from 0 to 8, the number of directions"),
    ):
        with pytest.raises(ValueError, match=message):
            maestro.set_ranks(model, ranks)
    assert model.out.sampled_rank is None
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"threshold={wrong} must be finite and not negative"):
            maestro.shrink(model, wrong)
    for rank in (-1, 1.5):
        with pytest.raises(ValueError, match=f"rank={rank} must be an integer of at least 0"):
            maestro.truncate(model, rank)  # type: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="method must be 'prefix' or 'svd', got 'qr'"):
        maestro.truncate(model, 1, "qr")  # type: ignore[bad-argument-type]
    with pytest.raises(ValueError, match=r"x has shape \(2, 7\); .* in_features=8"):
        linear()(jnp.ones((2, 7)))
    for rank, message in (
        (9, "rank=9 must be from 0 to 8"),
        (2.5, r"rank=2\.5 must be an integer"),
        (True, "rank=True must be an integer"),
        (np.arange(8), r"rank has shape \(8,\) and must have \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            linear()(X, rank=rank)
    with pytest.warns(UserWarning, match="threshold=1000 leaves a rank of 0 in every layer"):
        maestro.shrink(model, 1000)


def test_at_full_rank_training_is_that_of_plain_factors_and_sampled_ranks_cut_gradients() -> None:
    model = net()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    key = jax.random.key(3)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params: Any, sampled: bool) -> Any:
        def loss(params: Any) -> jax.Array:
            model = nnx.merge(graph, params, rest)
            if sampled:
                ranks = maestro.sample_ranks(key, maestro.current_ranks(model), "independent")
                maestro.set_ranks(model, ranks)
            return jnp.sum(model(X) ** 2)

        return jax.grad(loss)(params)

    @jax.jit
    def plain(a: jax.Array, b: jax.Array) -> Any:
        def loss(a: jax.Array, b: jax.Array) -> jax.Array:
            x = X
            for i in range(3):
                x = x @ a[i] @ b[i] + model.blocks.bias[i]
            return jnp.sum((x @ model.out.factors().first @ model.out.factors().second) ** 2)

        return jax.grad(loss, (0, 1))(a, b)

    full = gradient(params, False)["blocks"]
    expected = plain(*model.blocks.factors())
    assert_close(full["ordered_in"]["kernel"][...], expected[0], 200)
    assert_close(full["ordered_out"]["kernel"][...], expected[1], 200)
    ranks = maestro.sample_ranks(key, maestro.current_ranks(model), "independent")["blocks"]
    found = gradient(params, True)["blocks"]
    for i, k in enumerate(np.asarray(ranks)):
        a, b = (found[name]["kernel"][i] for name in ("ordered_in", "ordered_out"))
        assert not np.any(a[:, k:])
        assert not np.any(b[k:])
        assert np.all(np.any(b[:k] != 0, axis=1))
    assert min(ranks) < 8


def test_shrinking_counts_important_directions_and_lets_them_return() -> None:
    model = net()
    a = model.blocks.ordered_in.kernel[...]
    model.blocks.ordered_in.kernel[...] = a.at[0, :, 3:].multiply(1e-6).at[1].set(0.0)
    found = jax.tree.map(np.asarray, maestro.shrink(model, 1e-3))
    np.testing.assert_array_equal(found["blocks"], [3, 0, 8])
    assert int(found["out"]) == 8
    kept = jax.tree.map(lambda x: np.sum(x >= 1e-3, axis=-1), maestro.importance(model))
    assert all(np.array_equal(found[name], kept[name]) for name in found)
    model.blocks.ordered_in.kernel[...] = a
    np.testing.assert_array_equal(maestro.shrink(model, 1e-3)["blocks"], [8, 8, 8])
    model.blocks.ordered_in.kernel[...] = a.at[2, 0, 0].set(jnp.nan)
    assert int(maestro.shrink(model, 1e-3)["blocks"][2]) >= 1  # nan is not hidden


def test_ranks_that_fall_take_the_place_of_sampled_ones() -> None:
    """A step in NNX's style leaves its sampled ranks in the model."""
    layer = linear()
    expected = layer(X, rank=2)
    assert_close(maestro.truncate(maestro.set_ranks(layer, {"": 7}), 2)(X), expected)
    maestro.set_ranks(layer, {"": 7})
    a = layer.ordered_in.kernel
    a[...] = a[...].at[:, 2:].set(0.0)
    assert int(maestro.shrink(layer)[""]) == 2
    assert layer.sampled_rank is None


def test_bfloat16_layers_keep_their_dtype_and_measure_in_float32() -> None:
    layer = MaestroLinear(8, 12, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    a, b = layer.factors()
    assert a.dtype == b.dtype == jnp.bfloat16
    x = jnp.asarray(X, jnp.bfloat16)
    assert layer(x, rank=jnp.array(3)).dtype == jnp.bfloat16
    assert maestro.penalty(layer).dtype == maestro.importance(layer)[""].dtype == jnp.float32
    merged = maestro.merge(maestro.truncate(layer, 3)).kernel[...]
    a, b = jnp.float32(a[:, :3]), jnp.float32(b[:3])
    assert_close(merged, a @ b, 1, dtype=jnp.bfloat16)


def test_on_eight_devices_every_part_of_the_batch_has_the_same_ranks() -> None:
    graph, state = nnx.split(linear())
    x = np.random.default_rng(5).standard_normal((16, 8), np.float32)

    @jax.jit
    def step(state: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, state)
        ranks = maestro.sample_ranks(key, maestro.current_ranks(model))
        return maestro.set_ranks(model, ranks)(x), ranks

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    of_device = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    y, ranks = step(state, jax.device_put(x, of_device), jax.random.key(1))
    assert y.sharding.is_equivalent_to(of_device, 2)
    assert ranks[""].sharding.is_fully_replicated
    alone, expected = step(state, x, jax.random.key(1))
    assert ranks == expected
    assert 0 < ranks[""] < 8
    assert_close(y, alone)


def test_copies_and_pickles_keep_ranks_apart() -> None:
    layer = linear()
    layer.rank[...] = 2
    copy = pickle.loads(pickle.dumps(layer))
    assert_close(copy(X), layer(X))
    assert int(linear().rank[...]) == 8


def test_linen_through_the_bridge() -> None:
    module = nnx.bridge.to_linen(MaestroLinear, 8, 12)
    variables = module.init(jax.random.key(0), X)
    params = variables["params"]
    assert params["ordered_in"]["kernel"].shape == (8, 8)
    y = module.apply(variables, X)
    assert variables["Rank"]["rank"] == 8
    a, b = params["ordered_in"]["kernel"], params["ordered_out"]["kernel"]
    assert_close(y, X @ a @ b)
    cut = {**variables, "Rank": {"rank": jnp.array(2)}}
    assert_close(module.apply(cut, X), X @ a[:, :2] @ b[:2])


def test_ranks_are_saved_and_restored(tmp_path: Any) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")
    model = maestro.truncate(net(), 3)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.to_pure_dict(nnx.state(model)))
        checkpointer.wait_until_finished()
        other = net()
        target = nnx.to_pure_dict(nnx.state(other))
        restored = checkpointer.restore(tmp_path / "model", target)
    nnx.update(other, restored)
    assert jax.tree.all(
        jax.tree.map(jnp.array_equal, maestro.current_ranks(other), maestro.current_ranks(model))
    )


@pytest.mark.slow
def test_galore_with_moments_in_8_bits_trains_stacked_factors() -> None:
    model = net()
    options = {"rank": 2, "refresh_every": 2}
    options |= {"weight_dimension_numbers": lro.weight_dimension_numbers(model)}
    tx = lro.low_bit(lro.galore(0.05, **options), 8, min_size=1)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    state = jax.jit(tx.init)(params)
    bases = [x.shape for x in jax.tree.leaves(state) if x.ndim == 3 and x.dtype == jnp.float32]
    assert (3, 8, 2) in bases
    loss = lambda params: jnp.mean(nnx.merge(graph, params, rest)(X) ** 2)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(12):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]


@pytest.mark.slow
def test_lora_attaches_to_the_factors_and_merges() -> None:
    model = maestro.truncate(nnx.Sequential(linear()), 3)
    before = model(X)
    lro.adapters.attach(model, lro.adapters.LoRA(rank=1), where="ordered", rngs=1)
    assert_close(model(X), before)
    adapters = nnx.state(model, lro.adapters.trainable)
    nnx.update(model, jax.tree.map(jnp.ones_like, adapters))
    adapted = model(X)
    assert float(jnp.max(jnp.abs(adapted - before))) > 1
    assert_close(model.layers[0](X, rank=3), adapted)  # masked, as adapters are not cut
    for call in (maestro.merge, maestro.compact, lambda m: maestro.truncate(m, 1, "svd")):
        with pytest.raises(ValueError, match="the factors of layers/0 have adapters"):
            call(model)
    lro.adapters.merge(model)
    lro.adapters.detach(model)
    assert_close(model(X), adapted, 100)
    assert_close(maestro.merge(model)(X), adapted, 100)


@pytest.mark.full
def test_few_bit_activations_after_it_give_nearly_the_gradient() -> None:
    layer = linear()
    activation = functools.partial(lro.activations.gelu, bits=3)
    total = lambda layer, function: jnp.sum(function(layer(X, rank=jnp.array(5))) ** 2)
    few, plain = (nnx.grad(total)(layer, f) for f in (activation, nnx.gelu))
    few, plain = (np.ravel(g["ordered_in"]["kernel"][...]) for g in (few, plain))
    cosine = np.dot(few, plain) / np.linalg.norm(few) / np.linalg.norm(plain)
    assert 0.95 < cosine < 1 - 1e-6


@pytest.mark.full
@pytest.mark.parametrize("true_rank", [2, 5])
def test_rank_falls_to_that_of_the_regression(true_rank: int) -> None:
    """Sampled prefixes order the directions, and the prox makes zeros of those not needed."""
    rng = np.random.default_rng(true_rank)
    inputs = rng.standard_normal((256, 16)).astype(np.float32)
    target = rng.standard_normal((16, true_rank)) @ rng.standard_normal((true_rank, 12)) / 4
    outputs = jnp.float32(inputs @ target)
    model = nnx.Sequential(MaestroLinear(16, 12, use_bias=False, rngs=nnx.Rngs(0)))
    tx = optax.chain(optax.sgd(0.02, momentum=0.9), maestro.prox(0.02, 0.02))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry

        def loss(params: Any) -> jax.Array:
            model = nnx.merge(graph, params, rest)
            ranks = maestro.sample_ranks(key, maestro.current_ranks(model))
            return jnp.mean((maestro.set_ranks(model, ranks)(inputs) - outputs) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(0), 3000)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(
        (params, tx.init(params))
    )
    model = nnx.merge(graph, params, rest)
    assert int(maestro.shrink(model, 1e-5)["layers/0"]) == true_rank
    maestro.compact(model)
    error = jnp.mean((model(inputs) - outputs) ** 2) / jnp.mean(outputs**2)
    assert float(error) < 0.05
