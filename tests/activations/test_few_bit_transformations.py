"""Few-bit functions under transformations of JAX, remat of Flax, and on eight devices."""

import functools
import re
from typing import Any

from close import assert_close
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lowrank_optax.activations.coded_backward import CODES, few_bit
from tests.activations.test_few_bit import backward, equal, kept, levels_at, normal

pytestmark = pytest.mark.usefixtures("coarse_grid")


# Of 1 bit the codes are packed as of 3 are.
@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.full), 3, 4, 8])
def gelu(request: pytest.FixtureRequest) -> Any:
    return few_bit(jax.nn.gelu, request.param)


def far_from_boundaries(fn: Any, *inputs: Any) -> None:
    """Asserts that rounding changes no code: then programs that differ by rounding compare."""
    boundaries = np.asarray(fn.codebook.boundaries)
    for x in inputs:
        assert np.abs(np.asarray(x)[..., None] - boundaries).min() > 1e-5


def test_vmap_and_jit_change_nothing(gelu: Any) -> None:
    x, y = normal((6, 5, 33)), normal((6, 5, 33), seed=1)
    nested = jax.vmap(jax.vmap(gelu, in_axes=1, out_axes=1))
    one = lambda x, y: backward(gelu, x, y)

    @jax.jit
    def gradients(x: jax.Array, y: jax.Array) -> Any:
        found = [backward(fn, x, y) for fn in (gelu, jax.vmap(gelu), nested, jax.jit(gelu))]
        flat = jax.vmap(jax.vmap(jax.vmap(jax.grad(gelu))))(x)
        return [*found, jax.vmap(one)(x, y)], flat

    found, slopes = gradients(x, y)
    for gradient in found:
        equal(gradient, y * levels_at(gelu, x))
    equal(slopes, levels_at(gelu, x))


def test_scan_over_stacked_layers_is_the_loop(gelu: Any) -> None:
    x, weights = normal((3, 4)), normal((2, 4, 4), seed=1) / 4

    def loop(weights: jax.Array) -> jax.Array:
        y = x
        for w in weights:
            y = gelu(y @ w)
        return jnp.sum(jnp.square(y))

    def scan(weights: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jax.lax.scan(lambda y, w: (gelu(y @ w), None), x, weights)[0]))

    first = x @ weights[0]
    far_from_boundaries(gelu, first, np.asarray(jax.nn.gelu(first)) @ weights[1])
    assert_close(*jax.jit(lambda w: (jax.grad(scan)(w), jax.grad(loop)(w)))(weights), 100)


KEEP = jax.checkpoint_policies.save_only_these_names(CODES)


def test_checkpoint_keeps_the_codes_by_name_or_makes_them_again(gelu: Any) -> None:
    x, w, y = normal((8, 5)), normal((5, 4), seed=1), normal((8, 4), seed=2)
    plain = lambda x: gelu(x @ w)
    by_name = jax.checkpoint(plain, policy=KEEP)
    again = jax.checkpoint(plain)
    far_from_boundaries(gelu, x @ w)
    run = jax.jit(lambda x: [backward(fn, x, y) for fn in (plain, by_name, again)])
    expected = (y * levels_at(gelu, x @ w)) @ w.T
    for found in run(x):
        assert_close(found, expected, dtype=np.float32)
    names = lambda fn, x: {(leaf.dtype.name, leaf.shape) for leaf in kept(fn, x)}
    codes = names(gelu, y)
    assert codes <= names(by_name, x)
    assert not codes & names(again, x)
    # By name, not even the product is computed again in the backward pass.
    program = lambda fn: str(jax.make_jaxpr(lambda x: jax.vjp(fn, x)[1](y))(x))
    products = [program(fn).count("dot_general[") for fn in (plain, by_name, again)]
    assert products == [2, 2, 3]


@pytest.mark.slow
def test_remat_of_flax_and_checkpoint_within_scan_see_first_derivatives_only(gelu: Any) -> None:
    class Layer(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return gelu(self.linear(x))

    layer, x = Layer(), normal((3, 4))
    far_from_boundaries(gelu, layer.linear(x))
    remat = nnx.remat(Layer.__call__)

    @nnx.jit
    def gradients(layer: Any) -> Any:
        loss = lambda layer, call: jnp.sum(jnp.square(call(layer, x)))
        return [nnx.grad(loss)(layer, call) for call in (remat, Layer.__call__)]

    assert_close(*map(nnx.to_pure_dict, gradients(layer)), 100)
    scan = lambda body: jnp.sum(jax.lax.scan(body, x, length=2)[0])
    step = lambda w: lambda y, _: (gelu(y @ w), None)
    kept_in_scan = lambda w: scan(jax.checkpoint(step(w), policy=KEEP))
    w = normal((4, 4), seed=1) / 4
    far_from_boundaries(gelu, x @ w, np.asarray(jax.nn.gelu(x @ w)) @ w)
    plain = lambda w: scan(step(w))
    assert_close(*jax.jit(lambda w: (jax.grad(kept_in_scan)(w), jax.grad(plain)(w)))(w), 100)


def test_backward_is_linear_in_the_cotangent(gelu: Any) -> None:
    x, y = normal((5, 33)), normal((5, 33), seed=1)

    @jax.jit
    def both(x: jax.Array, y: jax.Array) -> Any:
        pull = lambda y: backward(gelu, x, y)
        transposed = jax.linear_transpose(pull, y)(y)[0]  # a diagonal matrix
        return transposed, jax.jvp(pull, (y,), (y,))[1], jax.jacrev(gelu)(x[0])

    transposed, tangent, jacobian = both(x, y)
    for found in (transposed, tangent):
        equal(found, y * levels_at(gelu, x))
    equal(jacobian, np.diag(levels_at(gelu, x[0])))


def test_donated_inputs_give_the_same(gelu: Any) -> None:
    x, y = normal((16, 128)), normal((16, 128), seed=1)
    step = jax.jit(lambda x: (gelu(x), backward(gelu, x, y)), donate_argnums=0)
    found, gradient = step(jnp.array(x))
    equal(found, jax.nn.gelu(x))
    equal(gradient, y * levels_at(gelu, x))


def test_nan_and_infinities_get_the_outer_levels(gelu: Any) -> None:
    x = np.float32([np.nan, -np.inf, np.inf, 1e38, -1e38])
    y = np.float32([1, 1, 1, np.nan, 1])
    found = jax.jit(lambda x, y: backward(gelu, x, y))(x, y)
    below, above = levels_at(gelu, [-1e30, 1e30])
    equal(found, [below, below, above, np.nan, below])


# Eight devices.


@pytest.mark.combinations(2)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x"), P("x", None, "y")], ids=str)
def test_the_sharded_gradient_is_the_unsharded_one(gelu: Any, spec: P, axis_type: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    x, y = normal((16, 8, 32)), normal((16, 8, 32), seed=1)
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, spec)
        found = jax.jit(functools.partial(backward, gelu))(*jax.device_put((x, y), where))
    assert found.sharding.is_equivalent_to(where, 3)
    equal(found, y * levels_at(gelu, x))


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
    mapped = [
        jax.shard_map(gelu, mesh=mesh, in_specs=spec, out_specs=spec)
        for spec in (P("x"), P(None, "x"))
    ]
    for found in jax.jit(lambda x, y: [backward(fn, x, y) for fn in mapped])(x, y):
        equal(found, y * levels_at(gelu, x))
