"""Nonlinearities found in any function, by the calls it makes."""

import functools
import math

from close import assert_close
from flax import linen, nnx
import jax
from jax import nn
from jax.ad_checkpoint import checkpoint_policies
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.activations.finding import NAMES

pytestmark = pytest.mark.usefixtures("coarse_grid")
few_bit_calls = lro.activations.few_bit_calls
random = np.random.default_rng(0)
X = jnp.asarray(np.linspace(-4, 4, 40, dtype=np.float32).reshape(5, 8))
WEIGHTS = {
    name: jnp.asarray(random.standard_normal(shape, np.float32))
    for name, shape in (("up", (8, 16)), ("down", (16, 8)))
}


def mlp(weights, x, act=nn.gelu):
    return act(act(x @ weights["up"]) @ weights["down"])


def kept_bytes(fn, *args):
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(fn, *a)[1], *args))
    return sum(math.prod(x.shape) * jax.dtypes.itemsize_bits(x.dtype) for x in kept if x.shape) / 8


def found(fn, *args, **options):
    return [row.function for row in few_bit_calls(fn, **options).report(*args).rows]


@pytest.mark.slow
@pytest.mark.bitwise  # the same small programs, which are lowered once more
def test_forward_is_bit_equal():
    """Outside `jit`: within it fusions may round anew."""
    few = few_bit_calls(mlp, 3)
    np.testing.assert_array_equal(few(WEIGHTS, X), mlp(WEIGHTS, X))
    assert_close(jax.jit(few)(WEIGHTS, X), jax.jit(mlp)(WEIGHTS, X), 100)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_model_written_by_hand():
    few = few_bit_calls(mlp, 3)
    by_hand = functools.partial(mlp, act=lambda x: lro.activations.gelu(x, 3))
    gradient = lambda fn: jax.jit(jax.grad(lambda w: fn(w, X).sum()))(WEIGHTS)
    assert_close(gradient(few), gradient(by_hand), 400)
    plain = gradient(mlp)
    assert np.abs(np.subtract(gradient(few)["up"], plain["up"])).max() > 1e-4


@pytest.mark.slow
def test_kept_bytes_fall_to_the_codes():
    fn = lambda x: nn.gelu(nn.gelu(x))  # nothing else keeps anything
    assert kept_bytes(fn, X) >= 2 * 4 * X.size
    assert kept_bytes(few_bit_calls(fn, 4), X) == 2 * X.size / 2
    report = few_bit_calls(fn, 4).report(X)
    assert (report.bytes_now, report.bytes_then) == (kept_bytes(fn, X), X.size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, *(pytest.param(x, marks=pytest.mark.full) for x in (jnp.float32, jnp.float16))],
)
def test_every_function_is_known(dtype):
    x = jax.ShapeDtypeStruct((5, 8), dtype)
    for name in NAMES:
        for fn in (getattr(nn, name), jax.vmap(getattr(nn, name))):
            assert found(fn, x, functions=NAMES, bits=1) == [name]


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda x: nn.gelu(x, approximate=False), "gelu(approximate=False)"),
        (lambda x: nn.leaky_relu(x, 0.2), "leaky_relu(negative_slope=0.2)"),
        (lambda x: nn.leaky_relu(x, negative_slope=0.01), "leaky_relu"),
        (lambda x: nn.elu(x, 0.5), "elu(alpha=0.5)"),
        (lambda x: nn.celu(x, 2.0), "celu(alpha=2.0)"),
        (lambda x: nn.squareplus(x, 1.0), "squareplus(b=1.0)"),
        (lambda x: nn.relu(nn.relu(x)), "relu"),
        (lambda x: 2 * nn.silu(x + 1), "silu"),
        (lambda x: jax.jit(nn.gelu)(x), "gelu"),
        (lambda x: nnx.swish(x), "silu"),
        (lambda x: linen.gelu(x), "gelu"),
    ],
)
def test_calls_are_found_with_their_options(fn, name):
    assert set(found(fn, X, bits=1)) == {name}
    assert_close(jax.jit(few_bit_calls(fn, 1))(X), jax.jit(fn)(X))


def assert_nearly_the_same(few, fn):
    """Forward to rounding, backward as near as 8 bits are."""
    both = lambda fn: jax.jit(lambda x: (fn(x), jax.grad(lambda x: fn(x).sum())(x)))(X)
    (found, gradient), (expected, exact) = both(few), both(fn)
    assert_close(found, expected)
    np.testing.assert_allclose(gradient, exact, atol=0.01)


@jax.jit
def silu(x):
    return x * nn.sigmoid(1.01 * x)


@jax.custom_jvp
def straight_through(x):
    return nn.hard_tanh(x)


straight_through.defjvp(lambda x, t: (straight_through(*x), t[0]))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.maximum(x, 0),  # its gradient at 0 is a half
        lambda x: x * nn.sigmoid(x),  # written out, here and below
        lambda x: 0.5 * x * (1 + jax.lax.erf(x / np.sqrt(2))),
        lambda x: jnp.where(x > 0, x, 0),
        lambda x: jnp.log1p(jnp.exp(x)),
        silu,  # not that of jax.nn
        straight_through,
        nn.sigmoid,
        lambda x: x + jax.lax.stop_gradient(jnp.where(x > 0, 0, -x)),  # forward it is relu
        jnp.abs,
        lambda x: x * 1.0,
        lambda x: lro.activations.gelu(x),
        lambda x: nn.leaky_relu(x, x[0, 0]),  # a slope that is an array
        lambda x: nn.silu(x[0, 0]),
        lambda x: x.sum(),
    ],
)
def test_what_is_something_else_is_left_alone(fn):
    with pytest.raises(ValueError, match=r"none of the functions that are looked for.*gelu, silu"):
        few_bit_calls(fn)(X)


def quick_gelu(x):
    return x * nn.sigmoid(1.702 * x)


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [lambda fn: fn, jax.jit])
def test_a_function_of_the_user_is_found_where_a_program_calls_it(wrapped):
    own, fn = wrapped(quick_gelu), lambda x: wrapped(quick_gelu)(x) + 1
    few = few_bit_calls(fn, 8, functions=["gelu", own])
    assert [row.function for row in few.report(X).rows] == ["quick_gelu"]
    assert_nearly_the_same(few, fn)


def test_a_function_with_a_rule_of_its_own_is_found_by_its_name():
    fn = lambda x: straight_through(x) * 2
    assert found(fn, X, functions=[straight_through]) == ["straight_through"]


@pytest.mark.slow
def test_values_in_between_that_are_used_elsewhere_stay_right():
    def fn(x):
        gate = nn.sigmoid(1.702 * x)
        return gate * x + gate

    assert_nearly_the_same(
        few_bit_calls(fn, 8, functions=[lambda x: nn.sigmoid(1.702 * x) * x]), fn
    )


def deep(stack, x):
    @jax.jit
    def layer(x, w):
        return x + nn.silu(x @ w) * nn.gelu(x @ w.T, approximate=False)

    x, _ = jax.lax.scan(lambda x, w: (jax.checkpoint(layer)(x, w), None), x, stack)
    return jax.lax.cond(x.sum() > 0, nn.relu, nn.mish, x)


@pytest.mark.slow
def test_bodies_of_scans_branches_checkpoints_and_jitted_functions_are_searched():
    stack = np.random.default_rng(0).standard_normal((3, 8, 8), np.float32) / 4
    few = few_bit_calls(deep)
    assert_close(jax.jit(few)(stack, X), jax.jit(deep)(stack, X), 100)
    rows = {row.function: row for row in few.report(stack, X).rows}
    assert {name: row.count for name, row in rows.items()} == {
        "silu": 3,
        "gelu(approximate=False)": 3,
        "relu": 1,
        "mish": 1,
    }
    assert rows["silu"].remat
    assert not rows["mish"].remat
    assert "test_calls.py" in rows["silu"].source
    gradient = jax.grad(lambda w, x: few(w, x).sum())
    one = jax.jit(gradient)(stack, X)
    each = jax.jit(jax.vmap(gradient, (None, 0)))(stack, jnp.stack([X, X]))
    assert_close(each[1], one, 400)


def test_policies_of_checkpoint_keep_the_codes_where_they_say_so():
    fn = lambda x: nn.gelu(jnp.sin(x))
    for names, size in (("few_bit_codes",), X.size / 2), ((), 0):
        policy = checkpoint_policies.save_only_these_names(*names)
        few = few_bit_calls(jax.checkpoint(fn, policy=policy), 4)
        assert kept_bytes(few, X) == size + 4 * X.size  # and the input


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_and_bodies_of_shard_map(axis_type):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    spec = PartitionSpec("data")

    def mapped(w, x):
        return jax.lax.psum(nn.silu(x @ w).sum() + nn.gelu(x @ w).sum(), "data")

    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, spec))
        over = functools.partial(
            jax.shard_map, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec()
        )
        for fn in (lambda w, x: nn.gelu(x @ w).sum(), over(mapped)):
            few, w = few_bit_calls(fn), np.eye(8, dtype=np.float32)
            (found, gradient), (value, exact) = (
                jax.jit(jax.value_and_grad(f))(w, x) for f in (few, fn)
            )
            assert_close(found, value, 100)
            np.testing.assert_allclose(gradient, exact, atol=16 * 0.15)


def test_where_chooses_by_scope_and_by_source():
    def first(x):
        with jax.named_scope("first"):
            return nn.gelu(x)

    def second(x):
        with jax.named_scope("second"):
            return nn.gelu(x)

    fn = lambda x: second(first(x))
    for where in ("^second", r"second .*test_calls\.py", ["second", "second"]):
        rows = few_bit_calls(fn, where=where).report(X).rows
        assert [row.scope for row in rows] == ["second"]
    with pytest.raises(ValueError, match="in places that match third"):
        few_bit_calls(fn, where="third")(X)
    with pytest.raises(ValueError, match=r"where='secnd' matches no call .* there are 'second"):
        few_bit_calls(fn, where=["second", "secnd"])(X)


def test_only_arrays_are_traced_and_results_may_be_anything():
    def fn(x, flag, name, steps=3):
        assert flag is True
        assert isinstance(steps, int)
        return {"y": nn.gelu(x), "name": name, "steps": steps, "none": None}

    out = few_bit_calls(fn)(X, True, "a", steps=5)
    np.testing.assert_array_equal(out.pop("y"), nn.gelu(X))
    assert out == {"name": "a", "steps": 5, "none": None}


def test_the_report_says_whether_the_value_behind_is_kept_anyway():
    def fn(weights, x):
        h = nn.gelu(x @ weights["up"])
        h = jnp.where(x[0, 0] > 0, h, 0) * 2  # linear
        return nn.silu(h @ weights["down"]).sum()

    report = few_bit_calls(fn).report(WEIGHTS, X, argnums=0)
    assert [row.saved_for for row in report.rows] == [("product",), ()]
    assert "After 1 of 2 calls the value is saved anyway" in str(report)
    assert "saved_residuals" in str(report)
    frozen = few_bit_calls(fn).report(WEIGHTS, X, argnums=1)
    assert [row.saved_for for row in frozen.rows] == [(), ()]
    gated = few_bit_calls(lambda w, x: nn.silu(x @ w["up"]) * (x @ w["up"])).report(WEIGHTS, X)
    assert gated.rows[0].saved_for == ("multiplication",)


def test_layers_that_call_one_line_are_one_row():
    layer = lambda x: nn.gelu(x @ jnp.eye(8))
    (row,) = few_bit_calls(lambda x: layer(layer(x)), 4).report(X).rows
    assert (row.count, row.bytes_then) == (2, 2 * X.size / 2)


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="fn=3"):
        few_bit_calls(3)
    with pytest.raises(ValueError, match="bits=9"):
        few_bit_calls(mlp, 9)
    with pytest.raises(ValueError, match="'gleu'; known by name are: gelu"):
        few_bit_calls(mlp, functions=["gleu"])
    with pytest.raises(ValueError, match="at least one"):
        few_bit_calls(mlp, functions=[])
    with pytest.raises(TypeError, match="neither a name"):
        few_bit_calls(mlp, functions=[3])
    with pytest.raises(ValueError, match="where='\\('"):
        few_bit_calls(mlp, where="(")
    with pytest.raises(ValueError, match="packing"):
        few_bit_calls(mlp, packing="zip")
