"""Each kind of Linen layer with a LoRA, against NumPy in float64."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro

Adapted = lro.adapters.linen.Adapted
RANDOM = lro.adapters.LoRA(rank=2, alpha=6, initial="random")


@functools.partial(jax.jit, static_argnums=0)
def _run(model, variables, *args):
    return model.apply(variables, *args)


def _adapted(module, x, method=RANDOM):
    base = jax.jit(module.init)(jax.random.key(0), x)
    adapted = Adapted(module, method, ".*")
    return adapted, base, adapted.attach(base, jax.random.key(1), x)


def _exact(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def _delta(variables):
    p = _exact(variables["adapters"]["default"])
    return 3.0 * p["A"] @ p["B"]


def _x(*shape):
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def test_dense_adds_the_scaled_product():
    x = _x(3, 4)
    adapted, base, variables = _adapted(nn.Dense(5), x)
    p = _exact(base["params"])
    expected = _exact(x) @ (p["kernel"] + _delta(variables)) + p["bias"]
    np.testing.assert_allclose(_run(adapted, variables, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "axis"),
    [
        ((2, 1, 3), (0, 2)),
        ((2, 3, 2), (1,)),
        pytest.param((3, 2), (0,), marks=pytest.mark.full),
        pytest.param((1, 2, 3, 2), (1, 2, 3), marks=pytest.mark.full),
    ],
)
def test_dense_general_contracts_any_axes(sizes, axis):
    x, features = _x(*sizes), (2, 3)
    adapted, base, variables = _adapted(nn.DenseGeneral(features, axis=axis), x)
    kernel = _exact(base["params"]["kernel"])
    kernel = kernel + _delta(variables).reshape(kernel.shape)
    expected = np.tensordot(_exact(x), kernel, (axis, range(len(axis))))
    np.testing.assert_allclose(_run(adapted, variables, x), expected, rtol=1e-4, atol=1e-4)


def test_dense_general_with_batch_dimensions_has_an_adapter_for_each():
    x = _x(3, 2, 4)
    adapted, base, variables = _adapted(nn.DenseGeneral(5, axis=-1, batch_dims=0), x)
    assert variables["adapters"]["default"]["A"].shape == (3, 4, 2)
    p = _exact(base["params"])
    expected = np.einsum("bnd,bde->bne", _exact(x), p["kernel"] + _delta(variables))
    expected += p["bias"][:, None]
    np.testing.assert_allclose(_run(adapted, variables, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_call", [False, True])
def test_einsum_with_its_equation_in_the_layer_or_at_the_call(at_call):
    equation, x = "btd,dhk->bhtk", _x(2, 3, 4)
    module = nn.Einsum((4, 2, 3), None if at_call else equation, use_bias=False)
    inputs = (x, equation) if at_call else (x,)
    base = module.init(jax.random.key(0), *inputs)
    adapted = Adapted(module, RANDOM, ".*")
    variables = adapted.attach(base, jax.random.key(1), *inputs)
    kernel = _exact(base["params"]["kernel"]) + _delta(variables).reshape(4, 2, 3)
    expected = np.einsum(equation, _exact(x), kernel)
    result = adapted.apply(variables, *inputs)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_the_bias_of_an_einsum_is_read_in_the_order_of_its_output():
    x, bias_init = _x(2, 3, 4), nn.initializers.normal()
    module = nn.Einsum((3, 5, 4), "bed,efd->bfe", bias_init=bias_init)
    adapted, _, variables = _adapted(module, x, lro.adapters.DoRA(rank=2))
    longer = lambda path, a: 2 * a if "magnitude" in jax.tree_util.keystr(path) else a
    trained = jax.tree_util.tree_map_with_path(longer, variables["adapters"])
    variables = {**variables, "adapters": trained}
    merged, _ = adapted.merge(variables)
    expected = _run(module, {"params": merged["params"]}, x)
    np.testing.assert_allclose(_run(adapted, variables, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "padding", ["SAME", "CIRCULAR", pytest.param("VALID", marks=pytest.mark.full)]
)
def test_convolution_equals_one_with_the_summed_kernel(padding):
    module, x = nn.Conv(3, (2, 3), strides=(1, 2), padding=padding), _x(2, 5, 6, 2)
    adapted, base, variables = _adapted(module, x)
    params = base["params"]
    kernel = params["kernel"] + _delta(variables).reshape(params["kernel"].shape)
    expected = _run(module, {"params": {**params, "kernel": kernel}}, x)
    np.testing.assert_allclose(_run(adapted, variables, x), expected, rtol=1e-4, atol=1e-4)


def test_embedding_looks_up_rows_of_the_sum():
    index = np.array([[0, 3], [2, 2]])
    method = lro.adapters.LoRA(rank=2, alpha=6)
    adapted, base, variables = _adapted(nn.Embed(4, 5), index, method)
    assert not np.any(variables["adapters"]["default"]["A"])
    plain = np.asarray(base["params"]["embedding"])
    np.testing.assert_array_equal(_run(adapted, variables, index), plain[index])
    trained = jax.tree.map(lambda a: np.asarray(a) + np.float32(0.5), variables["adapters"])
    variables = {**variables, "adapters": trained}
    table = _exact(base["params"]["embedding"]) + _delta(variables)
    np.testing.assert_allclose(_run(adapted, variables, index), table[index], rtol=1e-5, atol=1e-5)


def test_bfloat16_layers_have_float32_arrays_and_bfloat16_outputs():
    x = _x(3, 4).astype(jnp.bfloat16)
    module = nn.Dense(5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    adapted, _, variables = _adapted(module, x)
    assert variables["adapters"]["default"]["A"].dtype == jnp.float32
    assert jax.eval_shape(adapted.apply, variables, x).dtype == jnp.bfloat16
    merged, report = adapted.merge(variables)
    assert merged["params"]["kernel"].dtype == jnp.bfloat16
    assert 0 < report.rows[0].rounding_error < 0.05


def test_partitioned_parameters_stay_in_their_boxes():
    module = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    x = _x(3, 2)
    adapted, base, variables = _adapted(module, x)
    merged, _ = adapted.merge(variables)
    assert merged["params"]["kernel"].names == base["params"]["kernel"].names
    result = module.apply({"params": merged["params"]}, x)
    np.testing.assert_allclose(result, adapted.apply(variables, x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_layers_and_their_arrays_equal_those_of_nnx():
    from flax import nnx

    x = _x(2, 3, 8)
    attention = nn.MultiHeadDotProductAttention(2)
    base = jax.jit(attention.init)(jax.random.key(0), x, x)
    adapted = Adapted(attention, RANDOM)
    variables = adapted.attach(base, jax.random.key(1), x, x)
    model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.State(base["params"]))
    lro.adapters.attach(model, RANDOM, rngs=0)
    for layer, arrays in variables["adapters"]["default"].items():
        for name, array in arrays.items():
            getattr(model, layer).adapters["default"].arrays[name].set_value(array)
    of_linen = lambda a: (adapted.apply({**variables, "adapters": a}, x, x) ** 2).sum()
    trainable = nnx.DiffState(0, lro.adapters.trainable)
    gradient = nnx.jit(nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=trainable))(model)
    gradient = nnx.to_pure_dict(gradient)
    of_linen = jax.jit(jax.grad(of_linen))
    for layer, arrays in of_linen(variables["adapters"])["default"].items():
        for name, array in arrays.items():
            other = gradient[layer]["adapters"]["default"]["arrays"][name]
            np.testing.assert_allclose(array, other, rtol=1e-4, atol=1e-4)


def test_a_masked_convolution_multiplies_by_another_weight():
    mask = jnp.ones((3, 4, 6)).at[0].set(0)
    module, x = nn.Conv(6, (3,), mask=mask), _x(2, 5, 4)
    base = module.init(jax.random.key(0), x)
    adapted = Adapted(module, lro.adapters.PiSSA(rank=2), where=".*")
    with pytest.raises(TypeError, match="PiSSA reads the layer's weight, but the call of Conv"):
        adapted.attach(base, jax.random.key(1), x)
