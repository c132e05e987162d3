"""Few-bit functions under transformations of JAX, remat of Flax, and on eight devices."""

import functools
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lowrank_optax.activations.coded_backward import CODES, few_bit
from tests.activations.test_few_bit import backward, equal, levels_at, normal


@pytest.fixture(params=[1, 3, 4, 8])
def gelu(request: pytest.FixtureRequest) -> Any:
    return few_bit(jax.nn.gelu, request.param)


def total(fn: Any) -> Any:
    return lambda x: jnp.sum(fn(x) * jnp.arange(x.size).reshape(x.shape))


def test_vmap_and_jit_change_nothing(gelu: Any) -> None:
    x = normal((6, 5, 33))
    expected = jax.grad(total(gelu))(x)
    equal(jax.jit(jax.grad(total(gelu)))(x), expected)
    equal(jax.grad(total(jax.vmap(gelu)))(x), expected)
    equal(jax.grad(total(jax.vmap(jax.vmap(gelu, in_axes=1, out_axes=1))))(x), expected)
    one = jax.vmap(lambda x, y: backward(gelu, x, y))
    y = normal(x.shape, seed=1)
    equal(one(x, y), backward(gelu, x, y))
    equal(jax.vmap(jax.grad(gelu))(x.ravel()), jax.grad(lambda x: gelu(x).sum())(x.ravel()))


def test_scan_over_stacked_layers_is_the_loop(gelu: Any) -> None:
    x, weights = normal((9, 16)), normal((3, 16, 16), seed=1) / 8

    def loop(weights: jax.Array) -> jax.Array:
        y = x
        for w in weights:
            y = gelu(y @ w)
        return jnp.sum(jnp.square(y))

    def scan(weights: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jax.lax.scan(lambda y, w: (gelu(y @ w), None), x, weights)[0]))

    for run in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        np.testing.assert_allclose(run(scan)(weights), run(loop)(weights), rtol=2e-5, atol=1e-5)


KEEP = jax.checkpoint_policies.save_only_these_names(CODES)


def kept(fn: Any, x: jax.Array) -> set[tuple[str, tuple[int, ...]]]:
    return {(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(jax.vjp(fn, x)[1])}


def test_checkpoint_keeps_the_codes_by_name_or_makes_them_again(gelu: Any) -> None:
    w = normal((33, 40), seed=1)
    plain = lambda x: gelu(x @ w)
    by_name = jax.checkpoint(plain, policy=KEEP)
    again = jax.checkpoint(plain)
    x, y = normal((16, 33)), normal((16, 40), seed=2)
    for fn in (by_name, again, jax.jit(by_name), jax.jit(again)):
        np.testing.assert_allclose(backward(fn, x, y), backward(plain, x, y), rtol=1e-5, atol=1e-5)
    codes = kept(gelu, y)
    assert codes <= kept(by_name, x)
    assert not codes & kept(again, x)
    # By name, not even the product is computed again in the backward pass.
    program = lambda fn: str(jax.make_jaxpr(lambda x: jax.vjp(fn, x)[1](y))(x))
    products = [program(fn).count("dot_general[") for fn in (plain, by_name, again)]
    assert products == [2, 2, 3]


def test_remat_of_flax_and_checkpoint_within_scan_see_first_derivatives_only(gelu: Any) -> None:
    class Layer(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(16, 16, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return gelu(self.linear(x))

    layer, x = Layer(), normal((9, 16))
    loss = lambda layer, x: jnp.sum(jnp.square(layer(x)))
    plain = nnx.grad(loss)(layer, x)
    for wrapped in (nnx.remat(Layer.__call__), nnx.jit(nnx.remat(Layer.__call__))):
        found = nnx.grad(lambda layer, x, w=wrapped: jnp.sum(jnp.square(w(layer, x))))(layer, x)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, plain)
    scan = lambda body: jnp.sum(jax.lax.scan(body, x, length=3)[0])
    step = lambda w: lambda y, _: (gelu(y @ w), None)
    w = normal((16, 16), seed=1) / 8
    expected = jax.grad(lambda w: scan(step(w)))(w)
    found = jax.jit(jax.grad(lambda w: scan(jax.checkpoint(step(w), policy=KEEP))))(w)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_backward_is_linear_in_the_cotangent(gelu: Any) -> None:
    x, y = normal((5, 33)), normal((5, 33), seed=1)
    pull = lambda y: backward(gelu, x, y)
    equal(jax.linear_transpose(pull, y)(y)[0], pull(y))  # a diagonal matrix
    equal(jax.jvp(pull, (y,), (y,))[1], pull(y))
    equal(jnp.diagonal(jax.jacrev(gelu)(x.ravel())), jax.vmap(jax.grad(gelu))(x.ravel()))


def test_donated_inputs_give_the_same(gelu: Any) -> None:
    x = normal((16, 128))
    expected = jax.jit(jax.value_and_grad(total(gelu)))(x)
    found = jax.jit(jax.value_and_grad(total(gelu)), donate_argnums=0)(x + 0)
    jax.tree.map(equal, found, expected)


def test_nan_and_infinities_get_the_outer_levels(gelu: Any) -> None:
    x = jnp.array([jnp.nan, -jnp.inf, jnp.inf, 1e38, -1e38])
    found = jax.jit(lambda x: backward(gelu, x, jnp.ones_like(x)))(x)
    below, above = levels_at(gelu, jnp.array([-1e30, 1e30]))
    equal(found, np.array([below, below, above, above, below]))
    assert np.isnan(backward(gelu, x[3:], jnp.array([jnp.nan, 1.0]))[0])


# Eight devices.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x"), P("x", None, "y")], ids=str)
def test_the_sharded_gradient_is_the_unsharded_one(gelu: Any, spec: P, axis_type: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    x, y = normal((16, 8, 32)), normal((16, 8, 32), seed=1)
    expected = backward(gelu, x, y)
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, spec)
        found = jax.jit(functools.partial(backward, gelu))(*jax.device_put((x, y), where))
    assert found.sharding.is_equivalent_to(where, 3)
    equal(found, expected)


@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x"), P("x", None, "y")], ids=str)
def test_devices_exchange_nothing_for_batches_and_features(gelu: Any, spec: P) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    where = NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((16, 8, 32), jnp.float32, sharding=where)
    step = jax.jit(functools.partial(backward, gelu), out_shardings=where)
    program = step.lower(x, x).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|all-reduce|collective-permute", program)


def test_shard_map_is_the_whole(gelu: Any) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x, y = normal((16, 32)), normal((16, 32), seed=1)
    for spec in (P("x"), P(None, "x")):
        mapped = jax.shard_map(gelu, mesh=mesh, in_specs=spec, out_specs=spec)
        equal(jax.jit(functools.partial(backward, mapped))(x, y), backward(gelu, x, y))
