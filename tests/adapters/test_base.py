"""What every method gets from the definition of an adapter."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.base import byte_count, parameter_count
from lowrank_optax.adapters.operands import Rows
from tests.adapters.compiled import compiled, gradient, layer_output
from tests.adapters.methods import METHODS

LoRA = compiled(lro.adapters.LoRA)
X = np.random.default_rng(2).normal(size=(7, 5)).astype(np.float32)


def drawn(method: Any, layers: int = 3) -> tuple[Any, np.ndarray]:
    weights = np.random.default_rng(0).normal(size=(layers, 5, 4)).astype(np.float32)
    return method.init(jax.random.key(1), weights), weights


def test_options_out_of_range_are_refused_where_they_are_given() -> None:
    for options, error in (
        ({"rank": 0}, ValueError),
        ({"rank": (2, 0)}, ValueError),
        ({"rank": 2.0}, TypeError),
        ({"rank": True}, TypeError),
        ({"rank": ()}, TypeError),
        ({"dropout": 1.0}, ValueError),
        ({"dropout": -0.1}, ValueError),
    ):
        ((name, value),) = options.items()
        with pytest.raises(error, match=f"{name}=") as raised:
            LoRA(**options)
        assert repr(value) in str(raised.value)


def test_weights_that_are_no_stack_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights\[None\]"):
        LoRA(rank=1).init(jax.random.key(0), jnp.zeros((5, 4)))


def test_a_stack_needs_a_rank_for_each_of_its_layers() -> None:
    with pytest.raises(ValueError, match="2 ranks for a stack of 3 weights"):
        drawn(LoRA(rank=(1, 2)))


def test_a_layer_of_a_stack_computes_with_its_own_change() -> None:
    method = LoRA(rank=2, alpha=6, initial="random")
    params, weights = drawn(method)
    deltas = method.deltas(params, weights)
    for layer in range(3):
        p = method.layer_arrays(params, layer)
        a, b = (np.asarray(p[k], np.float64) for k in "AB")
        np.testing.assert_allclose(deltas[layer], 3 * a @ b, atol=1e-5)
        y = X @ weights[layer]
        out = layer_output(method, p, Rows(X), y, weight=weights[layer])
        np.testing.assert_allclose(out, y + X @ deltas[layer], atol=1e-5)


def test_beyond_a_layers_own_rank_nothing_has_a_part_or_a_gradient() -> None:
    method = LoRA(rank=(1, 3, 2), alpha=6, initial="random")
    params, weights = drawn(method)
    ones = jax.tree.map(np.ones_like, params.trainable)
    params = params._replace(trainable=ones)
    # All-ones factors of rank r make r in every place, at scale 6 / r: 6, whatever the rank.
    assert_close(method.deltas(params, weights), np.full((3, 5, 4), 6.0))
    loss = lambda trainable: method.deltas(params._replace(trainable=trainable), weights).sum()
    grads = gradient(loss, ones)
    within = np.arange(3) < np.array([[1], [3], [2]])
    np.testing.assert_array_equal(np.any(grads["A"], axis=1), within)
    np.testing.assert_array_equal(np.any(grads["B"], axis=2), within)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merging_sums_in_float32_and_rounds_once(dtype: Any) -> None:
    method = LoRA(rank=2, initial="random")
    params, weights = drawn(method)
    p, weight = method.layer_arrays(params, 0), weights[0].astype(dtype)
    exact = np.asarray(weight, np.float32) + method.delta(p, weight)
    merged, error = method.merged(p, weight)
    assert merged.dtype == dtype
    # Half a unit in the last place, beside what float32 sums of two programs differ by.
    half_unit = 2 ** np.floor(np.log2(np.abs(exact))) * float(jnp.finfo(dtype).eps) / 2
    distance = np.abs(np.asarray(merged, np.float32) - exact)
    assert (distance <= half_unit + 1e-6).all()
    assert_close(error, distance.max(), size=np.abs(exact).max())
    assert (float(error) == 0) == (dtype == jnp.float32)
    back = np.asarray(method.unmerged(p, merged), np.float32)
    size = np.maximum(np.abs(np.asarray(weight, np.float32)), np.abs(exact))
    np.testing.assert_array_less(np.abs(back - np.asarray(weight, np.float32)), 2**-7 * size)


def test_no_matrix_of_the_weights_shape_is_formed_forward_or_backward() -> None:
    method = lro.adapters.LoRA(rank=2)
    params, weights = drawn(method, layers=1)
    p, weight = method.layer_arrays(params, 0), weights[0]

    def loss(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return layer_output(method, p, Rows(x), y, weight=weight).sum()

    grads = jax.grad(loss, argnums=(0, 1, 2))
    jaxpr = str(jax.make_jaxpr(grads)(p, jnp.ones((7, 5)), jnp.ones((7, 4))))
    assert "f32[5,2]" in jaxpr
    assert "f32[5,4]" not in jaxpr
    assert "f32[4,5]" not in jaxpr


def test_counts_are_of_numbers_and_bytes() -> None:
    tree = {"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), "b": jnp.zeros(5)}
    assert (parameter_count(tree), byte_count(tree)) == (11, 32)


def test_nothing_is_dropped_without_a_key_and_the_same_is_dropped_with_the_same_key() -> None:
    method = LoRA(rank=2, dropout=0.5, initial="random")
    params, weights = drawn(method, layers=1)
    p, y = method.layer_arrays(params, 0), np.zeros((7, 4), np.float32)
    x = np.ones((7, 5), np.float32)
    out = lambda key: layer_output(method, p, Rows(x), y, weight=weights[0], key=key)
    still = x @ method.delta(p, weights[0])
    np.testing.assert_allclose(out(None), still, atol=1e-5)
    np.testing.assert_array_equal(out(jax.random.key(0)), out(jax.random.key(0)))
    assert not np.allclose(out(jax.random.key(0)), out(jax.random.key(1)))
    # The mean over keys is the output without dropout.
    each = jax.jit(jax.vmap(out))(jax.random.split(jax.random.key(2), 4000))
    mean = np.mean(each, axis=0)
    np.testing.assert_allclose(mean, still, atol=0.08)


@pytest.mark.parametrize(
    "method",
    [
        # The last axis of its gamma is the smaller side, whichever that is.
        *(m for m in METHODS.values() if not isinstance(m, lro.adapters.RandLoRA)),
        lro.adapters.MiSS(rank=3, mini_rank=2),
        lro.adapters.LoRAFA(rank=2),
        lro.adapters.AFLoRA(rank=2),
        lro.adapters.LaMDA(rank=2),
        lro.adapters.SVFit(rank=2),
        lro.adapters.LoTR(rank=2, share="input", initial="tucker_residual"),
        lro.adapters.LoTR(rank=2, share="output", initial="tucker"),
        lro.adapters.LoTR(rank=2, group_by="kind_and_block", block_size=1),
    ],
    ids=str,
)
def test_a_method_says_which_axes_are_inputs_and_outputs(method: lro.adapters.Adapter) -> None:
    weights = jax.ShapeDtypeStruct((3, 22, 26), jnp.float32)
    params = jax.eval_shape(method.init, jax.random.key(0), weights)
    for name, x in (params.trainable | params.frozen).items():
        sides = {22: "in", 26: "out"}
        found = [sides.get(size) for size in x.shape]
        declared = method.axes.get(name, ())
        assert found == [None] * (x.ndim - len(declared)) + list(declared), name
