"""VeRA: shared random factors and two trained vectors."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.operands import Rows
from tests.adapters.compiled import compiled, gradient, layer_output
from tests.adapters.nnx_models import Scanned, Unrolled, call, tokens

VeRA = compiled(lro.adapters.VeRA)
RNG = np.random.default_rng(0)
WEIGHTS, X = (RNG.normal(size=s).astype(np.float32) for s in ((3, 6, 5), (7, 6)))


def moved(method):
    params = method.init(jax.random.key(0), WEIGHTS)
    draw = lambda x: RNG.normal(size=x.shape).astype(np.float32)
    return params._replace(trainable=jax.tree.map(draw, params.trainable))


@pytest.mark.parametrize("rank", [4, (1, 4, 2)])
def test_it_computes_the_papers_formula(rank):
    method = VeRA(rank=rank)
    params = moved(method)
    for layer in range(3):
        p = method.layer_arrays(params, layer)
        a, b_matrix, d, b = (np.asarray(p[k], np.float64) for k in ("A", "B", "d", "b"))
        own = slice(rank if isinstance(rank, int) else rank[layer])
        w = WEIGHTS[layer]
        expected = X @ w + ((X @ a[:, own]) * d[own]) @ b_matrix[own] * b
        y = layer_output(method, p, Rows(X), X @ w, weight=w)
        np.testing.assert_allclose(y, expected, atol=1e-4)
        np.testing.assert_allclose(X @ method.merged(p, w).weight, expected, atol=1e-4)


def test_it_starts_at_the_model_and_the_first_step_moves_b_alone():
    method = VeRA(rank=4)
    params = method.init(jax.random.key(0), WEIGHTS)
    p, y = method.layer_arrays(params, 0), X @ WEIGHTS[0]
    np.testing.assert_array_equal(layer_output(method, p, Rows(X), y, weight=WEIGHTS[0]), y)
    loss = lambda t: layer_output(method, p | t, Rows(X), y, weight=WEIGHTS[0]).sum()
    slopes = gradient(loss, {name: p[name] for name in ("d", "b")})
    assert not slopes["d"].any()
    assert slopes["b"].all()


def test_random_factors_have_the_papers_bounds_and_come_once_for_each_shape():
    shared = VeRA(rank=64).init_shared(jax.random.key(0), [WEIGHTS])
    for name, bound in (("A", 1.0), ("B", np.sqrt(6 / 64))):  # sqrt(6 / fan_in)
        assert 0.95 * bound < np.abs(shared.frozen[name]).max() <= bound
    for model in (Unrolled(2, nnx.Rngs(0)), Scanned(2, nnx.Rngs(0))):
        before = call(model, tokens())
        lro.adapters.attach(model, lro.adapters.VeRA(rank=4), "up|down", rngs=0)
        np.testing.assert_array_equal(call(model, tokens()), before)
        assert len(model.adapter_groups["default"]) == 2
        assert lro.adapters.summary(model).trained == 2 * (4 + 12) + 2 * (4 + 6)


def test_options_out_of_range_are_refused():
    for options, message in (
        ({"alpha": 2.0}, "alpha=2.0 must be None"),
        ({"d_initial": 0.0}, "d_initial=0.0 must be finite"),
        ({"d_initial": float("nan")}, "d_initial=nan must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            VeRA(**options)


@pytest.mark.parametrize("as_lora", [None, True])
def test_a_file_of_peft_holds_it_or_the_lora_that_it_is_equal_to(tmp_path, as_lora):
    model, names = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0))), {"layers/{}": "{}"}
    y = model(X)
    lro.adapters.attach(model, lro.adapters.VeRA(rank=4), rngs=0)
    arrays = model.layers[0].adapters["default"].arrays
    arrays["b"].set_value(RNG.normal(size=5).astype(np.float32))
    after = model(X)
    assert np.abs(after - y).max() > 0.1
    lro.adapters.save_peft(model, tmp_path / "vera", names=names, as_lora=as_lora)
    again = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
    lro.adapters.load_peft(again, tmp_path / "vera", names=names)
    np.testing.assert_allclose(again(X), after, atol=1e-5)


def test_a_second_attachment_that_would_replace_shared_arrays_is_refused():
    model = Unrolled(2, nnx.Rngs(0))
    attach = functools.partial(lro.adapters.attach, model, lro.adapters.VeRA(rank=2), rngs=0)
    attach(where="blocks/0/up")
    before = jax.tree.map(jnp.copy, nnx.state(model))
    with pytest.raises(ValueError, match="blocks/1/up would share arrays with layers that have"):
        attach(where="blocks/1")
    assert jax.tree.all(jax.tree.map(jnp.array_equal, before, nnx.state(model)))
    attach(where="blocks/1", name="other")
    attach(where="blocks/1/down")  # of another shape: a group of its own
