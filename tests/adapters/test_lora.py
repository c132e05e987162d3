"""LoRA and rsLoRA against NumPy in float64, and what the papers say must hold."""

import dataclasses
import functools

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import parameter_count
from lowrank_optax.adapters.operands import Lookup, Rows
from tests.adapters.compiled import compiled, gradient, layer_output, times

LoRA = compiled(lro.adapters.LoRA)
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
    return params._replace(trainable=moved)


def run(method, params, x, weights, layer=0, **options):
    p, w = method.layer_arrays(params, layer), weights[layer]
    return layer_output(method, p, Rows(x), times(x, w), weight=w, **options)


@pytest.mark.parametrize("initial", ["kaiming_uniform", "he_uniform", "gaussian"])
def test_starts_as_the_base_model_bit_for_bit(initial):
    weights, x = normal(0, 3, 8, 5), normal(1, 4, 8)
    method = LoRA(rank=2, alpha=7, initial=initial)
    params = method.init(KEY, weights)
    for layer in range(3):
        y = run(method, params, x, weights, layer)
        np.testing.assert_array_equal(y, x @ weights[layer])


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
    index = np.array([[3, 7], [0, 49]])
    p = method.layer_arrays(params, 0)
    y = layer_output(method, p, Lookup(index), table[0][index], weight=table[0])
    np.testing.assert_array_equal(y, table[0][index])


def test_an_embedding_looks_up_rows_of_the_merged_table():
    table = normal(0, 1, 50, 6)
    method = LoRA(rank=3, alpha=5)
    p = method.layer_arrays(trained(method, table, embedding=True), 0)
    index = np.array([[3, 7], [0, 49]])
    y = layer_output(method, p, Lookup(index), table[0][index], weight=table[0])
    size = np.abs(table[0]) + 5 / 3 * np.abs(p["A"]) @ np.abs(p["B"])
    assert_close(y, method.merged(p, table[0]).weight[index], size=size[index])


def test_the_worked_example():
    p = {"A": np.array([[1], [2]], np.float32), "B": np.array([[3, -1]], np.float32)}
    method, w = LoRA(rank=1, alpha=4), np.zeros((2, 2), np.float32)
    assert_close(method.delta(p, w), [[12, -4], [24, -8]])
    y = layer_output(method, p, Rows(np.ones((1, 2), np.float32)), w[:1], weight=w)
    assert_close(y, [[36, -12]])


# One token, none, several axes of them; sides of 1, ranks below, at and above the sides.
@pytest.mark.parametrize(
    ("d_in", "d_out", "rank", "tokens", "alpha", "stabilized", "dtype"),
    [
        (8, 5, 2, (4,), 16, False, "float32"),
        (8, 5, 3, (2, 3), 0.5, True, "float32"),
        (5, 9, 12, (3,), None, True, "float32"),
        (1, 4, 4, (2, 1, 2), 16, True, "bfloat16"),
        (4, 1, 1, (0, 3), 0.5, False, "float32"),
        (9, 6, 5, (1,), None, False, "float16"),
    ],
)
def test_forward_and_change_agree_with_float64(d_in, d_out, rank, tokens, alpha, stabilized, dtype):
    dtype = jnp.dtype(dtype)
    weights, x = normal(0, 2, d_in, d_out).astype(dtype), normal(1, *tokens, d_in).astype(dtype)
    method = LoRA(rank=rank, alpha=alpha, rank_stabilized=stabilized)
    params = trained(method, weights)
    y = run(method, params, x, weights, layer=1)
    scale = (rank if alpha is None else alpha) / (rank**0.5 if stabilized else rank)
    a, b = (np.asarray(params.trainable[k][1], np.float64) for k in "AB")
    delta = scale * a @ b
    expected = np.asarray(x, np.float64) @ (np.asarray(weights[1], np.float64) + delta)
    assert y.dtype == x.dtype
    assert y.shape == (*tokens, d_out)
    change = scale * np.abs(a) @ np.abs(b)
    of_x, of_w = (np.abs(np.asarray(z, np.float64)) for z in (x, weights[1]))
    # The change is formed from factors rounded to the dtype of the input.
    assert_close(y.astype(np.float64), expected, size=of_x @ (of_w + change), dtype=dtype)
    deltas = method.deltas(params, weights)
    assert deltas.dtype == np.float32
    assert_close(deltas[1], delta, size=change, dtype=np.float32)


@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_batch_axes_are_as_many_loras(batch):
    method = LoRA(rank=2, alpha=3, rank_stabilized=len(batch) > 1)
    a, b, w, x = (
        normal(i, *batch, *shape) for i, shape in enumerate([(5, 2), (2, 4), (5, 4), (6, 5)])
    )
    y = layer_output(method, {"A": a, "B": b}, Rows(x), x @ w, weight=w)
    for index in np.ndindex(*batch):
        p = {"A": a[index], "B": b[index]}
        one = layer_output(method, p, Rows(x[index]), x[index] @ w[index], weight=w[index])
        assert_close(y[index], one)


def test_gradients_have_their_closed_forms():
    weights, x, g = normal(0, 1, 7, 5), normal(1, 4, 7), normal(2, 4, 5)
    method = LoRA(rank=3, alpha=2)
    params = trained(method, weights)
    loss = lambda p, x: jnp.sum(
        g * layer_output(method, p, Rows(x), x @ weights[0], weight=weights[0])
    )
    got, dx = gradient(loss, method.layer_arrays(params, 0), x, argnums=(0, 1))
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
        g * layer_output(method, p, Rows(x), x @ weights[0], weight=weights[0])
    )
    grads = gradient(loss, p)
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
    size = np.abs(weights[1]) + 16 / 3 * np.abs(p["A"]) @ np.abs(p["B"])
    assert_close(x @ merged.weight, run(method, params, x, weights, 1), size=np.abs(x) @ size)
    assert_close(method.unmerged(p, merged.weight), weights[1], size=size)


def test_the_change_has_the_rank_at_most():
    method = LoRA(rank=3, alpha=16)
    delta = method.deltas(trained(method, np.zeros((1, 12, 10))), np.zeros((1, 12, 10)))[0]
    values = np.linalg.svd(np.asarray(delta), compute_uv=False)
    assert (values[3:] < 1e-5 * values[0]).all()


def test_ranks_above_the_sides_are_allowed():
    weights, x = normal(0, 1, 3, 2), normal(1, 4, 3)
    method = LoRA(rank=8, alpha=4)
    params = trained(method, weights)
    a, b = (params.trainable[k][0] for k in "AB")
    size = np.abs(x) @ (np.abs(weights[0]) + 0.5 * np.abs(a) @ np.abs(b))
    assert_close(run(method, params, x, weights), x @ (weights[0] + 0.5 * a @ b), size=size)


def test_rslora_is_lora_with_another_alpha():
    assert LoRA(rank=16, alpha=1).scale_of(16) == 0.0625
    assert LoRA(rank=16, alpha=1, rank_stabilized=True).scale_of(16) == 0.25
    weights, x = normal(0, 1, 8, 5), normal(1, 4, 8)
    stabilized = LoRA(rank=16, alpha=12 / 16**0.5, rank_stabilized=True)
    plain = LoRA(rank=16, alpha=12)
    params = trained(plain, weights)
    a, b = (np.abs(params.trainable[k][0]) for k in "AB")
    size = np.abs(x) @ (np.abs(weights[0]) + 12 / 16 * a @ b)
    assert_close(run(stabilized, params, x, weights), run(plain, params, x, weights), size=size)


@pytest.mark.slow
@pytest.mark.parametrize("stabilized", [False, True])
def test_ranks_of_their_own_are_as_many_loras(stabilized):
    """Sizes of what is summed are the same sums with all terms made positive."""
    weights, x, g = normal(0, 3, 8, 5), normal(1, 4, 8), normal(2, 4, 5)
    method = LoRA(rank=(1, 4, 2), alpha=6, rank_stabilized=stabilized)
    params = trained(method, weights)

    @functools.partial(jax.jit, static_argnums=0)
    def found(method, p, w):
        y = lambda p: layer_output(method, p, Rows(x), x @ w, weight=w)
        return method.delta(p, w), y(p), jax.grad(lambda p: jnp.sum(g * y(p)))(p)

    for layer, rank in enumerate(method.rank):
        own = dataclasses.replace(method.method, rank=rank)
        p, w = method.layer_arrays(params, layer), weights[layer]
        of_own = {"A": p["A"][:, :rank], "B": p["B"][:rank]}
        assert not p["A"][:, rank:].any()
        delta, y, grads = found(method.method, p, w)
        of_delta, of_y, of_grads = found(own, of_own, w)
        s = 6 / (rank**0.5 if stabilized else rank)
        a, b = np.abs(of_own["A"]), np.abs(of_own["B"])
        change, slope = s * a @ b, np.abs(x).T @ np.abs(g)
        assert_close(delta, of_delta, size=change)
        assert_close(y, of_y, size=np.abs(x) @ (np.abs(w) + change))
        assert_close(grads["A"][:, :rank], of_grads["A"], size=s * slope @ b.T)
        assert_close(grads["B"][:rank], of_grads["B"], size=s * a.T @ slope)
        assert not grads["A"][:, rank:].any()
        assert not grads["B"][rank:].any()


@pytest.mark.slow
def test_dropout_drops_the_input_of_the_branch_alone_and_keeps_its_mean():
    weights, x = normal(0, 1, 8, 5), normal(1, 2, 8)
    method = LoRA(rank=2, alpha=4, dropout=0.25)
    params = trained(method, weights)
    exact = run(method, params, x, weights)
    keys = jax.random.split(KEY, 4000)
    drawn = jax.jit(jax.vmap(lambda key: run(method, params, x, weights, key=key)))(keys)
    spread = np.std(drawn, axis=0).max()
    assert spread > 0.1
    np.testing.assert_allclose(np.mean(drawn, axis=0), exact, atol=5 * spread / 4000**0.5)
    zero = params._replace(trainable=params.trainable | {"B": np.zeros((1, 2, 5), np.float32)})
    np.testing.assert_array_equal(run(method, zero, x, weights, key=KEY), x @ weights[0])


def test_arrays_are_float32_on_a_bfloat16_model_and_counted_as_the_paper_does():
    stack = jax.ShapeDtypeStruct((24, 768, 768), jnp.bfloat16)
    params = jax.eval_shape(lambda: lro.adapters.LoRA(rank=8).init(KEY, stack))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert parameter_count(params.trainable) == 24 * 2 * 768 * 8 == 294_912
    assert not params.frozen
    assert params.base is None


def test_bad_options_are_refused_by_name():
    for options, error, message in (
        ({"rank": 0}, ValueError, "rank=0 must be at least 1"),
        ({"rank": (2, -1)}, ValueError, "rank="),
        ({"rank": 2.0}, TypeError, "rank=2.0 must be an int"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0"),
        ({"initial": "zeros"}, ValueError, "initial='zeros' must be one of"),
    ):
        with pytest.raises(error, match=message):
            LoRA(**options)


def test_as_many_ranks_as_layers_are_needed():
    with pytest.raises(ValueError, match="2 ranks for a stack of 3 weights"):
        LoRA(rank=(2, 4)).init(KEY, np.zeros((3, 4, 4)))
