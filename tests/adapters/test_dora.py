"""DoRA against NumPy in float64, and what the paper says must hold."""

import dataclasses

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import parameter_count
from lowrank_optax.adapters.operands import Lookup, Rows
from tests.adapters.compiled import Compiled, compiled, gradient, layer_output, on_host, times

DoRA = compiled(lro.adapters.DoRA)
KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def trained(method, weights, size=0.3):
    params = method.init(KEY, weights)
    moved = {
        k: x + size * normal(i, *x.shape).astype(x.dtype)
        for i, (k, x) in enumerate(params.trainable.items())
    }
    return params._replace(trainable=moved)


def start_of(method, weights, **options):
    """By separate operations: a length is then the root of the very sum that is kept beside it."""
    return on_host(method.method.init(KEY, weights, **options))


def reference(p, w, scale):
    """V, its norms and the merged weight, in float64."""
    a, b, m, w = (np.asarray(x, np.float64) for x in (p["A"], p["B"], p["magnitude"], w))
    v = w + scale * a @ b
    n = np.linalg.norm(v, axis=-2)
    return v, n, v * (m / n)[..., None, :]


def plain(x, w, bias=None):
    """The output of the layer itself."""
    y = times(x, w)
    return y if bias is None else y + bias


def run(method, p, x, w, bias=None, **options):
    return layer_output(method, p, Rows(x), plain(x, w, bias), weight=w, bias=bias, **options)


@pytest.mark.parametrize(
    ("d_in", "d_out", "rank", "batch", "biased"),
    [
        (7, 5, 3, (), False),
        (7, 5, 3, (), True),
        (4, 8, 9, (3,), True),
        (1, 3, 1, (), False),
        (6, 1, 2, (2, 2), False),
    ],
)
def test_forward_norms_and_merge_agree_with_float64(d_in, d_out, rank, batch, biased):
    stack = int(np.prod(batch))
    weights, x = normal(0, stack, d_in, d_out), normal(1, *batch, 4, d_in)
    method = DoRA(rank=rank, alpha=1.5)
    params = trained(method, weights)
    apart = lambda x: x.reshape(*batch, *x.shape[1:])
    p = {k: apart(v) for k, v in (params.trainable | params.frozen).items()}
    w, bias = apart(weights), normal(2, d_out) if biased else None
    _, n, merged = reference(p, w, 1.5 / rank)
    # A column that is all but cancelled has no direction to speak of in float32.
    size = np.linalg.norm(np.asarray(w), axis=-2)
    clear = np.abs(merged).max() * (size / n).max() * 1e-5
    y = run(method, p, x, w, bias)
    expected = x.astype(np.float64) @ merged + (0 if bias is None else bias)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 + 20 * clear)
    np.testing.assert_allclose(
        method.merged(p, w).weight, merged, rtol=1e-4, atol=1e-5 + 20 * clear
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
def test_starts_as_the_base_model_bit_for_bit(dtype, biased):
    dtype = jnp.dtype(dtype)
    weights, x = normal(0, 2, 8, 5).astype(dtype), normal(1, 4, 8).astype(dtype)
    bias = normal(2, 5).astype(dtype) if biased else None
    method = DoRA(rank=2, alpha=7)
    p = method.layer_arrays(start_of(method, weights), 1)
    y = run(method, p, x, weights[1], bias)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, plain(x, weights[1], bias))
    assert p["magnitude"].dtype == np.float32


def test_bfloat16_models_are_near_float64():
    weights, x = normal(0, 1, 32, 8).astype(jnp.bfloat16), normal(1, 4, 32)
    method = DoRA(rank=4, alpha=8)
    p = method.layer_arrays(trained(method, weights), 0)
    y = run(method, p, x.astype(jnp.bfloat16), weights[0], np.ones(8, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(x) @ reference(p, weights[0], 2)[2] + 1
    error = np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)
    assert error < 0.02


def test_no_array_of_the_weights_shape_is_made():
    w, x = jnp.asarray(normal(0, 33, 21)), jnp.asarray(normal(1, 4, 33))
    method = DoRA(rank=3)
    p = method.layer_arrays(trained(method, np.asarray(w[None])), 0)
    eager = method.method
    loss = lambda p: jnp.sum(jnp.sin(layer_output(eager, p, Rows(x), x @ w, weight=w, bias=None)))
    text = str(jax.make_jaxpr(jax.value_and_grad(loss))(p))
    made = [line for line in text.splitlines() if "=" in line and "f32[33,21]" in line]
    made += [line for line in text.splitlines() if "=" in line and "f32[21,33]" in line]
    # What stands for the weight itself is no new array.
    assert not [m for m in made if "stop_gradient" not in m and "= transpose" not in m], made


def test_the_norms_are_constants_for_the_gradient():
    w, x, g = normal(0, 7, 5), normal(1, 4, 7), normal(2, 4, 5)
    method = DoRA(rank=3, alpha=2)
    p = method.layer_arrays(trained(method, w[None]), 0)
    got = gradient(lambda p: jnp.sum(g * run(method, p, x, w)), p)
    v, n, _ = reference(p, w, 2 / 3)
    d = (x.T @ g) * (np.asarray(p["magnitude"]) / n)
    a, b = np.asarray(p["A"], np.float64), np.asarray(p["B"], np.float64)
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(got["magnitude"], np.sum(g * (x @ v), 0) / n, **close)
    np.testing.assert_allclose(got["B"], 2 / 3 * a.T @ d, **close)
    np.testing.assert_allclose(got["A"], 2 / 3 * d @ b.T, **close)
    assert not got["norm_squared"].any()


def test_with_no_change_and_the_first_lengths_it_is_the_identity():
    w, x = normal(0, 7, 5), normal(1, 4, 7)
    method = DoRA(rank=3)
    p = method.layer_arrays(trained(method, w[None]), 0)
    p["magnitude"] = np.linalg.norm(w, axis=0)
    for zero in "AB":
        still = p | {zero: np.zeros_like(p[zero])}
        assert_close(run(method, still, x, w), x @ w, size=np.abs(x) @ np.abs(w))


def test_longer_columns_give_the_same_output():
    w, x = normal(0, 7, 5), normal(1, 4, 7)
    method = DoRA(rank=3)
    p = method.layer_arrays(trained(method, w[None]), 0)
    c = np.array([0.5, 2, 1, 7, 0.1], np.float32)
    longer = p | {"B": p["B"] * c, "norm_squared": p["norm_squared"] * c**2}
    np.testing.assert_allclose(
        run(method, longer, x, w * c), run(method, p, x, w), rtol=1e-4, atol=1e-5
    )


def test_with_lengths_equal_to_the_norms_it_is_lora():
    w, x = normal(0, 7, 5), normal(1, 4, 7)
    method, lora = DoRA(rank=3, alpha=2), compiled(lro.adapters.LoRA)(rank=3, alpha=2)
    p = method.layer_arrays(trained(method, w[None]), 0)
    p["magnitude"] = reference(p, w, 2 / 3)[1].astype(np.float32)
    size = np.abs(x) @ (np.abs(w) + 2 / 3 * np.abs(p["A"]) @ np.abs(p["B"]))
    expected = layer_output(lora, p, Rows(x), x @ w, weight=w)
    assert_close(run(method, p, x, w), expected, 100, size=size)


def test_dropout_acts_on_the_rescaling_too():
    w, x, bias = normal(0, 7, 5), normal(1, 4, 7), normal(2, 5)
    method = DoRA(rank=3, alpha=2, dropout=0.4)
    p = method.layer_arrays(trained(method, w[None]), 0)
    y = run(method, p, x, w, bias, key=KEY)
    dropped = np.asarray(Rows(jnp.asarray(x)).drop(KEY, 0.4).x, np.float64)
    assert (dropped == 0).any()
    merged = reference(p, w, 2 / 3)[2]
    expected = x @ w + bias + dropped @ (merged - w)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_columns_of_zeros_are_safe_and_can_grow():
    w, x = normal(0, 7, 5), normal(1, 4, 7)
    w[:, 2] = 0
    method = DoRA(rank=3)
    p = method.layer_arrays(method.init(KEY, w[None]), 0)
    slopes = jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.square(run(method, p, x, w) - 1))))
    assert not run(method, p, x, w)[:, 2].any()
    start, _ = slopes(p)
    names = ("A", "B", "magnitude")
    for _ in range(50):
        last, grads = slopes(p)
        assert all(np.isfinite(grads[k]).all() for k in names)
        p = p | {k: p[k] - 0.01 * np.asarray(grads[k]) for k in names}
    assert last < start
    assert run(method, p, x, w)[:, 2].any()


def test_unmerging_gives_the_weight_back_also_columns_that_were_zero():
    w = normal(0, 12, 5)
    w[:, 2] = 0
    method = DoRA(rank=3, alpha=2)
    p = method.layer_arrays(trained(method, w[None], size=0.1), 0)
    p["magnitude"] = p["magnitude"] * np.array([1, -1, 1, 3, 0.2], np.float32)
    merged = method.merged(p, w)
    assert merged.rounding_error == 0
    back = method.unmerged(p, merged.weight)
    np.testing.assert_allclose(back, w, rtol=1e-5, atol=2e-6)
    lost = method.unmerged(p | {"magnitude": np.zeros(5, np.float32)}, 0 * merged.weight)
    assert np.isnan(lost[:, 0]).all()


def test_ranks_of_their_own_are_as_many_doras():
    weights, x = normal(0, 2, 8, 5), normal(1, 4, 8)
    method = DoRA(rank=(1, 3), alpha=6)
    params = method.init(KEY, weights)
    b = normal(2, 2, 3, 5)
    for layer, rank in enumerate(method.rank):
        own = Compiled(dataclasses.replace(method.method, rank=rank))
        p = method.layer_arrays(params, layer) | {"B": b[layer]}
        of_own = p | {"A": p["A"][:, :rank], "B": p["B"][:rank]}
        del of_own["rank_scale"]
        assert_close(run(method, p, x, weights[layer]), run(own, of_own, x, weights[layer]), 100)


def test_an_embedding_looks_up_rows_of_the_merged_table():
    table = normal(0, 1, 30, 6)
    method = DoRA(rank=3, alpha=5)
    start = start_of(method, table, embedding=True)
    index = np.array([[3, 7], [0, 29]])
    look = lambda p: layer_output(method, p, Lookup(index), table[0][index], weight=table[0])
    np.testing.assert_array_equal(look(method.layer_arrays(start, 0)), table[0][index])
    p = method.layer_arrays(trained(method, table), 0)
    np.testing.assert_allclose(
        look(p), method.merged(p, table[0]).weight[index], rtol=1e-4, atol=1e-5
    )


def test_counts_and_what_is_refused():
    method = DoRA(rank=4)
    params = method.init(KEY, np.zeros((3, 10, 6), np.float32))
    assert parameter_count(params.trainable) == 3 * (4 * (10 + 6) + 6)
    with pytest.raises(TypeError, match="not a change of low rank"):
        method.to_lora(method.layer_arrays(params, 0))
    with pytest.raises(TypeError, match="not a shape"):
        method.init(KEY, jax.ShapeDtypeStruct((3, 10, 6), jnp.float32))
