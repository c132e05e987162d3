"""LoRA and rsLoRA against NumPy in float64, and what the papers say must hold."""

import dataclasses

from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import parameter_count
from lowrank_optax.adapters.operands import Lookup, Rows

LoRA = lro.adapters.LoRA
KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def trained(method, weights, seed=1, **options):
    """Parameters as after training: none of them is zero within its rank."""
    params = method.init(KEY, weights, **options)
    within = method.init(KEY, weights)  # where columns are beyond a rank, A is zero
    moved = {k: x + 0.3 * normal(seed + i, *x.shape) for i, (k, x) in enumerate(params[0].items())}
    if isinstance(method.rank, tuple):
        mask = np.asarray(within.trainable["A"] != 0).any(1)
        moved["A"], moved["B"] = moved["A"] * mask[:, None, :], moved["B"] * mask[:, :, None]
    return params._replace(trainable={k: jnp.asarray(x) for k, x in moved.items()})


def run(method, params, x, weights, layer=0, **options):
    w = jnp.asarray(weights)[layer]
    p = method.layer_arrays(params, layer)
    return method.apply(p, Rows(jnp.asarray(x)), jnp.asarray(x) @ w, weight=w, **options)


@pytest.mark.parametrize("initial", ["kaiming_uniform", "he_uniform", "gaussian"])
def test_starts_as_the_base_model_bit_for_bit(initial):
    weights, x = normal(0, 3, 8, 5), normal(1, 4, 8)
    method = LoRA(rank=2, alpha=7, initial=initial)
    params = method.init(KEY, weights)
    for layer in range(3):
        y = run(method, params, x, weights, layer)
        np.testing.assert_array_equal(y, jnp.asarray(x) @ weights[layer])


@pytest.mark.parametrize(
    ("initial", "bound"),
    [("kaiming_uniform", 100**-0.5), ("he_uniform", (6 / 100) ** 0.5)],
)
def test_uniform_starts_have_the_bounds_of_peft_and_of_flax(initial, bound):
    a = LoRA(rank=16, initial=initial).init(KEY, np.zeros((4, 100, 3))).trainable["A"]
    assert 0.99 * bound < np.abs(a).max() <= bound
    np.testing.assert_allclose(np.std(a), bound / 3**0.5, rtol=0.02)


def test_a_gaussian_start_deviates_by_one_over_the_rank_of_each_layer():
    params = LoRA(rank=(4, 16), initial="gaussian").init(KEY, np.zeros((2, 1000, 3)))
    first, second = params.trainable["A"]
    np.testing.assert_allclose(np.std(first[:, :4]), 1 / 4, rtol=0.05)
    np.testing.assert_allclose(np.std(second), 1 / 16, rtol=0.05)
    assert not first[:, 4:].any()


def test_a_random_start_differs_from_the_base_model():
    weights, x = normal(0, 1, 8, 5), normal(1, 4, 8)
    method = LoRA(rank=2, initial="random")
    assert np.abs(run(method, method.init(KEY, weights), x, weights) - x @ weights[0]).max() > 1e-3


def test_layers_of_a_stack_start_differently():
    a = LoRA(rank=2).init(KEY, np.zeros((2, 6, 3))).trainable["A"]
    assert not np.allclose(a[0], a[1])


def test_embeddings_start_the_other_way_round_and_as_the_base():
    table = normal(0, 1, 50, 6)
    method = LoRA(rank=3)
    params = method.init(KEY, table, embedding=True)
    assert not params.trainable["A"].any()
    np.testing.assert_allclose(np.std(params.trainable["B"]), 1, rtol=0.4)
    index = jnp.array([[3, 7], [0, 49]])
    p = method.layer_arrays(params, 0)
    y = method.apply(p, Lookup(index), table[0][index], weight=jnp.asarray(table[0]))
    np.testing.assert_array_equal(y, table[0][index])


def test_an_embedding_looks_up_rows_of_the_merged_table():
    table = normal(0, 1, 50, 6)
    method = LoRA(rank=3, alpha=5)
    p = method.layer_arrays(trained(method, table, embedding=True), 0)
    index = jnp.array([[3, 7], [0, 49]])
    y = method.apply(p, Lookup(index), table[0][index], weight=jnp.asarray(table[0]))
    np.testing.assert_allclose(y, method.merged(p, table[0]).weight[index], rtol=1e-5, atol=1e-6)


def test_the_worked_example():
    p = {"A": jnp.array([[1.0], [2.0]]), "B": jnp.array([[3.0, -1.0]])}
    method, w = LoRA(rank=1, alpha=4), jnp.zeros((2, 2))
    np.testing.assert_array_equal(method.delta(p, w), [[12, -4], [24, -8]])
    y = method.apply(p, Rows(jnp.array([[1.0, 1.0]])), jnp.zeros((1, 2)), weight=w)
    np.testing.assert_array_equal(y, [[36, -12]])


@settings(deadline=None, max_examples=25)
@given(
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    rank=st.integers(1, 12),
    tokens=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    alpha=st.sampled_from([None, 0.5, 16]),
    stabilized=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_forward_and_change_agree_with_float64(d_in, d_out, rank, tokens, alpha, stabilized, dtype):
    weights, x = normal(0, 2, d_in, d_out), normal(1, *tokens, d_in)
    weights, x = jnp.asarray(weights, dtype), jnp.asarray(x, dtype)
    method = LoRA(rank=rank, alpha=alpha, rank_stabilized=stabilized)
    params = trained(method, weights)
    y = run(method, params, x, weights, layer=1)
    scale = (rank if alpha is None else alpha) / (rank**0.5 if stabilized else rank)
    a, b = (np.asarray(params.trainable[k][1], np.float64) for k in "AB")
    delta = scale * a @ b
    expected = np.asarray(x, np.float64) @ (np.asarray(weights[1], np.float64) + delta)
    eps = float(jnp.finfo(dtype).eps)
    assert y.dtype == x.dtype
    assert y.shape == (*tokens, d_out)
    bound = 20 * eps * (1 + np.abs(expected).max(initial=0) + scale * d_in * rank)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=bound)
    deltas = method.deltas(params, weights)
    assert deltas.dtype == jnp.float32
    np.testing.assert_allclose(deltas[1], delta, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    rank=st.integers(1, 4),
    stabilized=st.booleans(),
)
def test_batch_axes_are_as_many_loras(batch, rank, stabilized):
    method = LoRA(rank=rank, alpha=3, rank_stabilized=stabilized)
    a, b = jnp.asarray(normal(0, *batch, 5, rank)), jnp.asarray(normal(1, *batch, rank, 4))
    w, x = jnp.asarray(normal(2, *batch, 5, 4)), jnp.asarray(normal(3, *batch, 6, 5))
    y = method.apply({"A": a, "B": b}, Rows(x), x @ w, weight=w)
    for index in np.ndindex(*batch):
        p = {"A": a[index], "B": b[index]}
        one = method.apply(p, Rows(x[index]), x[index] @ w[index], weight=w[index])
        np.testing.assert_allclose(y[index], one, rtol=1e-5, atol=1e-5)


def test_gradients_have_their_closed_forms():
    weights, x, g = normal(0, 1, 7, 5), normal(1, 4, 7), normal(2, 4, 5)
    method = LoRA(rank=3, alpha=2)
    params = trained(method, weights)
    loss = lambda p, x: jnp.sum(g * method.apply(p, Rows(x), x @ weights[0], weight=weights[0]))
    got, dx = jax.grad(loss, argnums=(0, 1))(method.layer_arrays(params, 0), jnp.asarray(x))
    s = 2 / 3
    a, b = (np.asarray(params.trainable[k][0], np.float64) for k in "AB")
    np.testing.assert_allclose(got["B"], s * (x @ a).T @ g, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["A"], s * x.T @ (g @ b.T), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, g @ weights[0].T + s * (g @ b.T) @ a.T, rtol=1e-4, atol=1e-5)


def test_at_the_start_only_b_has_a_gradient_and_a_step_projects_the_full_one():
    weights, x, g = normal(0, 1, 7, 5), normal(1, 4, 7), normal(2, 4, 5)
    method, rate = LoRA(rank=3, alpha=2), 0.1
    p = method.layer_arrays(method.init(KEY, weights), 0)
    loss = lambda p: jnp.sum(
        g * method.apply(p, Rows(jnp.asarray(x)), jnp.asarray(x) @ weights[0], weight=weights[0])
    )
    grads = jax.grad(loss)(p)
    assert not grads["A"].any()
    moved = {k: x - rate * grads[k] for k, x in p.items()}
    a = np.asarray(p["A"], np.float64)
    expected = -rate * (2 / 3) ** 2 * a @ a.T @ (x.T @ g)
    np.testing.assert_allclose(method.delta(moved, weights[0]), expected, rtol=1e-4, atol=1e-6)


def test_merging_reproduces_the_forward_and_unmerging_the_weight():
    weights, x = normal(0, 2, 8, 6), normal(1, 5, 8)
    method = LoRA(rank=3, alpha=16)
    params = trained(method, weights)
    p = method.layer_arrays(params, 1)
    merged = method.merged(p, weights[1])
    assert merged.rounding_error == 0
    np.testing.assert_allclose(
        x @ merged.weight, run(method, params, x, weights, 1), rtol=1e-4, atol=1e-5
    )
    size = np.abs(merged.weight).max()
    np.testing.assert_allclose(method.unmerged(p, merged.weight), weights[1], atol=1e-6 * size)


def test_the_change_has_the_rank_at_most():
    method = LoRA(rank=3, alpha=16)
    delta = method.deltas(trained(method, np.zeros((1, 12, 10))), np.zeros((1, 12, 10)))[0]
    values = np.linalg.svd(np.asarray(delta), compute_uv=False)
    assert (values[3:] < 1e-5 * values[0]).all()


def test_ranks_above_the_sides_are_allowed():
    weights, x = normal(0, 1, 3, 2), normal(1, 4, 3)
    method = LoRA(rank=8, alpha=4)
    params = trained(method, weights)
    delta = 0.5 * np.asarray(params.trainable["A"][0]) @ np.asarray(params.trainable["B"][0])
    np.testing.assert_allclose(
        run(method, params, x, weights), x @ (weights[0] + delta), rtol=1e-4, atol=1e-5
    )


def test_rslora_is_lora_with_another_alpha():
    assert LoRA(rank=16, alpha=1).scale_of(16) == 0.0625
    assert LoRA(rank=16, alpha=1, rank_stabilized=True).scale_of(16) == 0.25
    weights, x = normal(0, 1, 8, 5), normal(1, 4, 8)
    stabilized = LoRA(rank=16, alpha=12 / 16**0.5, rank_stabilized=True)
    plain = LoRA(rank=16, alpha=12)
    params = trained(plain, weights)
    np.testing.assert_array_equal(
        run(stabilized, params, x, weights), run(plain, params, x, weights)
    )


@pytest.mark.parametrize("stabilized", [False, True])
def test_ranks_of_their_own_are_as_many_loras(stabilized):
    weights, x = normal(0, 3, 8, 5), normal(1, 4, 8)
    method = LoRA(rank=(1, 4, 2), alpha=6, rank_stabilized=stabilized)
    params = trained(method, weights)
    for layer, rank in enumerate(method.rank):
        own = dataclasses.replace(method, rank=rank)
        p = method.layer_arrays(params, layer)
        of_own = {"A": p["A"][:, :rank], "B": p["B"][:rank]}
        assert not p["A"][:, rank:].any()
        assert_close(method.delta(p, weights[layer]), own.delta(of_own, weights[layer]))

        def loss(p, method, w=weights[layer]):
            y = method.apply(p, Rows(jnp.asarray(x)), jnp.asarray(x) @ w, weight=jnp.asarray(w))
            return jnp.sum(jnp.sin(y))

        (value, grads), (of_value, of_grads) = (
            jax.value_and_grad(loss)(*pair) for pair in ((p, method), (of_own, own))
        )
        assert_close(value, of_value, 100)
        np.testing.assert_allclose(grads["A"][:, :rank], of_grads["A"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grads["B"][:rank], of_grads["B"], rtol=1e-4, atol=1e-5)
        assert not grads["A"][:, rank:].any()
        assert not grads["B"][rank:].any()


def test_dropout_drops_the_input_of_the_branch_alone_and_keeps_its_mean():
    weights, x = normal(0, 1, 8, 5), normal(1, 2, 8)
    method = LoRA(rank=2, alpha=4, dropout=0.25)
    params = trained(method, weights)
    exact = run(method, params, x, weights)
    keys = jax.random.split(KEY, 4000)
    drawn = jax.vmap(lambda key: run(method, params, x, weights, key=key))(keys)
    spread = np.std(drawn, axis=0).max()
    assert spread > 0.1
    np.testing.assert_allclose(np.mean(drawn, axis=0), exact, atol=5 * spread / 4000**0.5)
    zero = params._replace(trainable=params.trainable | {"B": jnp.zeros((1, 2, 5))})
    np.testing.assert_array_equal(
        run(method, zero, x, weights, key=KEY), jnp.asarray(x) @ weights[0]
    )


def test_arrays_are_float32_on_a_bfloat16_model_and_counted_as_the_paper_does():
    params = LoRA(rank=8).init(KEY, jax.ShapeDtypeStruct((24, 768, 768), jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert parameter_count(params.trainable) == 24 * 2 * 768 * 8 == 294_912
    assert not params.frozen
    assert params.base is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank=0 must be at least 1"),
        ({"rank": (2, -1)}, ValueError, "rank="),
        ({"rank": 2.0}, TypeError, "rank=2.0 must be an int"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0"),
        ({"initial": "zeros"}, ValueError, "initial='zeros' must be one of"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        LoRA(**options)


def test_as_many_ranks_as_layers_are_needed():
    with pytest.raises(ValueError, match="2 ranks for a stack of 3 weights"):
        LoRA(rank=(2, 4)).init(KEY, np.zeros((3, 4, 4)))
