"""Moments in 8 and 4 bits: the optimizer they are in is what it was."""

from typing import Any

from close import assert_close
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.quantization import Quantized, dequantize
from lowrank_optax.states.low_bit import moment_formats
from tests.projection.runs import state_bytes
from tests.quantization.tables import assert_same_codes
from tests.states.low_bit_runs import SHAPE, assert_same_state, kernel, low_bit, normal, run

bits_of_codes = pytest.mark.parametrize("bits", [8, 4])


# Numbers


@bits_of_codes
def test_the_first_step_is_that_of_float32(bits: Any) -> None:
    params, gradient = kernel(), kernel(seed=1)
    inner = optax.scale_by_adam()
    wanted, _ = inner.update(gradient, inner.init(params))
    tx = low_bit(inner, bits)
    found, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(gradient, params)
    assert_close(found, wanted)


@pytest.mark.slow
def test_three_steps_stay_within_what_two_roundings_explain() -> None:
    params = kernel((128, 64))
    adam = optax.scale_by_adam()
    chain = lambda inner: optax.chain(inner, optax.scale_by_learning_rate(1e-3))
    wide, narrow = (run(chain(x), params, 3)[0]["kernel"] for x in (adam, low_bit(adam)))
    assert 1e-5 < np.abs(np.asarray(wide - narrow)).max() < 4e-4


def naive_linear(inner: Any) -> Any:
    """Both moments rounded to 8 bits evenly, one scale for 256: the second with zero in its map."""

    def rounded(x: jax.Array, levels: int) -> jax.Array:
        blocks = x.reshape(-1, 256)
        scale = jnp.max(jnp.abs(blocks), 1, keepdims=True)
        even = jnp.round(blocks / jnp.where(scale > 0, scale, 1) * levels) / levels
        return (even * scale).reshape(x.shape)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, state, params)
        return updates, state._replace(mu=rounded(state.mu, 127), nu=rounded(state.nu, 255))

    return optax.GradientTransformation(inner.init, update)


@pytest.mark.slow
def test_a_quadratic_of_mixed_curvatures_is_minimised_where_linear_maps_explode() -> None:
    """Point 9 of the specification: what makes a zero in the second moment's map diverge."""
    size, rng = 4096, np.random.default_rng(0)
    noise = 0.1 * rng.normal(size=(500, size)).astype(np.float32)
    curvature = jnp.asarray(np.exp(rng.uniform(np.log(1e-3), 0, size)).astype(np.float32))
    start = jnp.asarray(rng.normal(size=size).astype(np.float32))

    def loss_after_500(inner: Any) -> float:
        tx = optax.chain(inner, optax.scale_by_learning_rate(1e-2))

        def step(carry: Any, noise: jax.Array) -> tuple[Any, None]:
            x, state = carry
            gradient = curvature * (x + noise)
            updates, state = tx.update(gradient, state, x)
            return (optax.apply_updates(x, updates), state), None

        def whole(x: jax.Array) -> jax.Array:
            (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), noise)
            return 0.5 * jnp.sum(curvature * x * x)

        return float(jax.jit(whole)(start))

    wide = loss_after_500(optax.scale_by_adam())
    eight = loss_after_500(lro.low_bit(optax.scale_by_adam(), 8))
    four = loss_after_500(lro.low_bit(optax.scale_by_adam(), 4))
    linear = loss_after_500(naive_linear(optax.scale_by_adam()))
    assert eight < 2 * wide
    assert four < 40 * wide
    assert linear > 1000 * wide


@pytest.mark.slow
@bits_of_codes
def test_the_step_uses_moments_before_they_are_rounded(bits: Any) -> None:
    gradient = kernel(seed=2)
    adam, tx = optax.scale_by_adam(), low_bit(optax.scale_by_adam(), bits)
    _, state = run(tx, kernel(), 2)
    inner = optax.ScaleByAdamState(
        count=jnp.asarray(2, jnp.int32),
        mu={"kernel": decoded(state, "mu", "signed", bits)},
        nu={"kernel": decoded(state, "nu", "unsigned", bits)},
    )
    wanted, _ = adam.update(gradient, inner)
    found, _ = jax.jit(tx.update)(gradient, state)
    assert_close(found, wanted, 100)


def decoded(state: Any, name: str, kind: Any, bits: Any, shape: Any = SHAPE) -> jax.Array:
    """A quantized moment of the kernel."""
    q = Quantized(getattr(state.codes, name)["kernel"], getattr(state.scales, name)["kernel"])
    fmt = moment_formats(bits)[kind]
    return jax.jit(lambda q: dequantize(q, fmt, shape))(q)


@bits_of_codes
def test_second_moments_have_no_zero_beside_others(bits: Any) -> None:
    gradient = {"kernel": normal(SHAPE) * jnp.logspace(-12, 0, SHAPE[1])}
    tx = low_bit(optax.scale_by_adam(), bits)
    _, state = jax.jit(lambda g: tx.update(g, tx.init(g)))(gradient)
    assert np.all(decoded(state, "nu", "unsigned", bits) > 0)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "bad"), [(8, np.inf), (4, np.nan)])
def test_a_bad_gradient_leaves_no_trace_in_the_state_but_its_own_element(
    bits: Any, bad: float
) -> None:
    tx, params = low_bit(optax.scale_by_adam(), bits, block_size=16), kernel()
    _, state = run(tx, params, 2)
    gradient = np.array(kernel(seed=3)["kernel"])
    update = jax.jit(tx.update)
    clean = update({"kernel": gradient}, state)[1]
    gradient[3, 5] = bad
    after = update({"kernel": gradient}, state)[1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    differs = np.asarray(after.scales.mu["kernel"] != clean.scales.mu["kernel"])
    assert not np.delete(differs.ravel(), 3 * 4).any()
    updates = update(kernel(seed=4), after)[0]["kernel"]
    assert np.isfinite(updates).all()


@pytest.mark.slow
def test_random_rounding_changes_from_step_to_step_and_repeats_with_the_seed() -> None:
    params, gradient = kernel(), kernel(seed=1)
    options = {"stochastic_rounding": True}
    update = lambda tx: jax.jit(lambda s: tx.update(gradient, s, params)[1])
    tx = low_bit(optax.scale_by_adam(b1=0.5, b2=0.5), **options)
    first = jax.jit(tx.init)(params)
    second = first._replace(count=jnp.asarray(7, jnp.int32))
    step = update(tx)
    codes = lambda state: np.asarray(step(state).codes.mu["kernel"])
    np.testing.assert_array_equal(codes(first), codes(first))
    assert (codes(first) != codes(second)).mean() > 0.2
    other = update(low_bit(optax.scale_by_adam(b1=0.5, b2=0.5), seed=1, **options))(first)
    assert (np.asarray(other.codes.mu["kernel"]) != codes(first)).mean() > 0.2
    assert np.abs(codes(first).astype(int) - codes(second)).max() <= 1
    assert step(first).count == 1


@pytest.mark.slow
def test_random_rounding_keeps_the_mean_of_a_slow_average() -> None:
    """A change of a thousandth at a step is lost by the nearest of sixteen codes."""
    gradient = {"kernel": jnp.full((8, 128), 0.5).at[:, 0].set(1.0)}
    found = {}
    for random in (False, True):
        tx = low_bit(optax.ema(0.99, debias=False), 4, stochastic_rounding=random)
        state = jax.jit(
            lambda tx=tx: jax.lax.scan(
                lambda s, _: (tx.update(gradient, s)[1], None), tx.init(gradient), length=300
            )[0]
        )()
        average = decoded(state, "ema", "signed", 4, shape=(8, 128))
        found[random] = float(average[:, 1:].mean())
    wanted = 0.5 * (1 - 0.99**300)
    assert abs(found[True] - wanted) < 0.03
    assert abs(found[True] - wanted) < abs(found[False] - wanted)


# Bytes and types


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "share"), [(8, 0.256), (4, 0.135)])
def test_state_bytes_of_real_shapes(bits: Any, share: float) -> None:
    shapes = {
        "embed": (32000, 2048),
        "layers": (24, 2048, 5461),
        "heads": (24, 2048, 32, 64),
        "norm": (24, 2048),
        "final": (2048,),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    wide = state_bytes(jax.eval_shape(optax.scale_by_adam().init, params))
    narrow = state_bytes(jax.eval_shape(lro.low_bit(optax.scale_by_adam(), bits).init, params))
    assert narrow <= share * wide
    assert narrow > bits / 32 * wide


@bits_of_codes
def test_bfloat16_gradients_get_bfloat16_updates_and_float32_arithmetic(bits: Any) -> None:
    params = {"kernel": normal(SHAPE).astype(jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}
    tx = lro.low_bit(optax.scale_by_adam(), bits, min_size=64)
    state = jax.jit(tx.init)(params)
    assert state.inner.mu["bias"].dtype == state.scales.mu["kernel"].dtype == jnp.float32
    updates, after = jax.jit(tx.update)(params, state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    wanted = jax.jit(tx.update)(wide, state, params)
    assert wanted[0]["kernel"].dtype == jnp.float32
    assert_same_codes(after.codes.nu["kernel"], wanted[1].codes.nu["kernel"], bits)


def test_codes_and_scales_are_parallel_trees_of_plain_arrays() -> None:
    state = jax.jit(low_bit(optax.adam(1e-3), 4).init)(kernel())
    leaves = jax.tree.leaves((state.codes, state.scales))
    assert {x.dtype.name for x in leaves} == {"uint8", "float32"}
    as_inner = lambda tree: jax.tree.structure(tree, is_leaf=lambda x: x is None)
    assert as_inner(state.inner) == as_inner(state.codes) == as_inner(state.scales)


@pytest.mark.slow
@bits_of_codes
def test_stacked_parameters_under_vmap_are_separate_ones(bits: Any) -> None:
    tx, stack = low_bit(optax.scale_by_adam(), bits), normal((3, *SHAPE))
    gradients = normal((3, *SHAPE), 1)

    def step(p: jax.Array, g: jax.Array) -> Any:
        return tx.update(g, tx.update(p, tx.init(p), p)[1], p)

    together = jax.jit(jax.vmap(step))(stack, gradients)
    one = jax.jit(step)
    alone = [one(np.asarray(stack)[i], np.asarray(gradients)[i]) for i in range(3)]
    assert_same_state(together, jax.tree.map(lambda *x: np.stack(x), *alone), bits)
