"""Gated nonlinearities: forward exact, kept for backward a few bits of each input."""

import functools
from typing import Any

from close import assert_close
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from lowrank_optax.activations.block_codes import BLOCK_SIZE, block_decode, block_encode
from lowrank_optax.activations.gating import gated, geglu, swiglu
from lowrank_optax.quantization.maps import NORMAL_LEVELS

SHAPE = (24, 130)
PLAIN = {
    swiglu: lambda gate, up: jax.nn.silu(gate) * up,
    geglu: lambda gate, up: jax.nn.gelu(gate) * up,
}
# Of d_gate and d_up, over their norms, for normal gates and ups; as measured, and a tenth more.
ERRORS = {1: 0.74, 2: 0.43, 3: 0.23, 4: 0.11, 5: 0.065, 6: 0.032, 7: 0.016, 8: 0.008}


def arrays(shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32, count: int = 3) -> Any:
    rng = np.random.default_rng(0)
    return [np.asarray(rng.standard_normal(shape)).astype(dtype) for _ in range(count)]


def gradients(fn: Any, gate: Any, up: Any, y: Any) -> Any:
    return jax.vjp(fn, gate, up)[1](y)


@functools.cache
def compiled(fn: Any, bits: int | None = None) -> Any:
    """Compiles the gradients of a gated function, or of a plain one."""
    return jax.jit(functools.partial(gradients, functools.partial(fn, bits=bits) if bits else fn))


def relative(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("fn", PLAIN)
def test_the_forward_pass_is_that_of_the_plain_function_to_the_last_bit(fn, dtype):
    """Outside `jit`, where both run the same small programs: within it fusions may round anew."""
    gate, up, _ = arrays(dtype=dtype)
    expected = PLAIN[fn](gate, up)
    for few in (functools.partial(fn, bits=bits) for bits in (None, 3)):
        # Alone, and in the pass that a gradient makes.
        for found in (few(gate, up), jax.vjp(few, gate, up)[0]):
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, expected)


def test_geglu_has_both_forms_of_gelu():
    gate, up, _ = arrays()
    exact, approximate = (geglu(gate, up, approximate=flag) for flag in (False, True))
    np.testing.assert_array_equal(exact, jax.nn.gelu(gate, approximate=False) * up)
    assert np.abs(exact - approximate).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_errors_of_the_gradient_fall_with_the_bits_as_documented(dtype):
    inputs = arrays(dtype=dtype)
    fns = [PLAIN[swiglu], *(functools.partial(swiglu, bits=bits) for bits in ERRORS)]
    expected, *every = jax.jit(lambda *inputs: [gradients(fn, *inputs) for fn in fns])(*inputs)
    errors = []
    for (bits, bound), found in zip(ERRORS.items(), every, strict=True):
        assert [x.dtype for x in found] == [dtype, dtype]
        errors.append(max(relative(*pair) for pair in zip(found, expected, strict=True)))
        assert errors[-1] < bound * (1.5 if dtype == jnp.bfloat16 and bits == 8 else 1)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("fn", PLAIN)
def test_without_bits_the_gradient_is_exact_and_two_arrays_are_kept(fn):
    gate, up, y = arrays()
    exact = functools.partial(fn, bits=None)
    assert_close(
        *(jax.jit(functools.partial(gradients, f))(gate, up, y) for f in (exact, PLAIN[fn]))
    )
    kept = lambda fn: jax.tree.leaves(jax.jit(lambda *x: jax.vjp(fn, *x)[1])(gate, up))
    np.testing.assert_array_equal(kept(exact), [gate, up])
    assert len(kept(PLAIN[fn])) > 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_kept_are_the_bits_and_a_scale_for_each_block_and_nothing_else(bits, dtype):
    gate, up, _ = arrays((64, 4 * BLOCK_SIZE), dtype)
    kept = jax.eval_shape(
        lambda *inputs: jax.vjp(functools.partial(swiglu, bits=bits), *inputs)[1], gate, up
    )
    leaves = jax.tree.leaves(kept)
    total = sum(x.size * (4 if x.dtype == jnp.uint4 else 8 * x.dtype.itemsize) for x in leaves)
    assert total == 2 * gate.size * (bits + 16 / BLOCK_SIZE)
    assert not any(x.shape == gate.shape and x.dtype == dtype for x in leaves)


def test_one_gradient_computed_by_hand():
    gate, up = np.float32([0.5, -2.0]), np.float32([3.0, 1.0])
    levels = np.array([-x for x in NORMAL_LEVELS[2][::-1]] + list(NORMAL_LEVELS[2]))
    nearest = lambda x: levels[np.argmin(np.abs(x[:, None] - levels), axis=1)]
    g, u = (np.abs(x).max() * nearest(x / np.abs(x).max()) for x in map(np.asarray, (gate, up)))
    sigmoid = 1 / (1 + np.exp(-g))
    y = np.array([1.0, -0.5])
    found = compiled(swiglu, 2)(gate, up, np.float32(y))
    assert_close(found[0], y * u * sigmoid * (1 + g * (1 - sigmoid)), 100)
    assert_close(found[1], y * g * sigmoid, 100)


SHAPES = [(), (0,), (3, 0), (1,), (7,), (5, 3), (2, 3, 65), (9, 1)]


@pytest.mark.parametrize("bits", [None, 1, 3, 4, 8])
def test_any_shape(bits):
    every = [arrays(shape) for shape in SHAPES]
    few = functools.partial(swiglu, bits=bits)
    run = lambda fn: jax.jit(lambda every: [gradients(fn, *inputs) for inputs in every])(every)
    found = run(few)
    assert [[x.shape for x in pair] for pair in found] == [[shape, shape] for shape in SHAPES]
    if bits in (None, 8):
        for pair in zip(*map(jax.tree.leaves, (found, run(PLAIN[swiglu]))), strict=True):
            assert not pair[0].size or relative(*pair) < 0.02


def test_blocks_of_zeros_and_numbers_that_are_not_finite_harm_no_neighbour():
    gate, up, y = arrays((2, 2 * BLOCK_SIZE))
    run = compiled(swiglu)
    clean = run(gate, up, y)
    gate[0, 5], gate[0, 7] = np.nan, np.inf
    up[1, :BLOCK_SIZE] = 0.0
    found = run(gate, up, y)
    np.testing.assert_array_equal(found[0][0, BLOCK_SIZE:], clean[0][0, BLOCK_SIZE:])
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(found[0][1, :BLOCK_SIZE], 0)
    # What comes with a gradient that is not finite goes on.
    y[0, 5] = np.nan
    assert np.isnan(run(gate, up, y)[0][0, 5])


@pytest.mark.parametrize("bits", [None, 1, 3, 4, 5])
def test_vmap_and_scan_compute_what_a_loop_does(bits):
    gate, up, y = arrays((3, 8, 40))
    fn = functools.partial(gradients, functools.partial(swiglu, bits=bits))
    one = jax.jit(fn)
    expected = [np.stack(x) for x in zip(*map(one, gate, up, y), strict=True)]
    scan = lambda *inputs: jax.lax.scan(lambda _, x: (None, fn(*x)), None, inputs)[1]
    for found in jax.jit(lambda *inputs: (jax.vmap(fn)(*inputs), scan(*inputs)))(gate, up, y):
        assert_close(list(found), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "name"), [(3, "few_bit_codes"), (None, "few_bit_factors")])
def test_remat_keeps_what_is_named_and_changes_no_gradient(bits, name):
    x, weights, _ = arrays((8, 16))
    gate = x @ weights.T
    codes = jax.jit(lambda x: [block_encode(part, 3) for part in (x, jnp.sin(x))])
    for shift in (-1e-5, 1e-5):  # rounding changes no code: programs that differ by it compare
        jax.tree.map(np.testing.assert_array_equal, codes(gate), codes(gate + np.float32(shift)))

    def loss(weights: jax.Array) -> jax.Array:
        gate = x @ weights.T
        return jnp.sum(swiglu(gate, jnp.sin(gate), bits) ** 2)

    policy = jax.checkpoint_policies.save_only_these_names(name)
    kept = jax.checkpoint(loss, policy=policy)
    everything = jax.checkpoint(loss)
    run = jax.jit(lambda weights: [jax.grad(fn)(weights) for fn in (loss, kept, everything)])
    expected, *found = run(weights)
    for gradient in found:
        assert_close(gradient, expected, 100)

    def bytes_of(fn: Any) -> int:
        leaves = jax.tree.leaves(jax.eval_shape(lambda w: jax.vjp(fn, w)[1], weights))
        return sum(x.size * x.dtype.itemsize for x in leaves if x.shape != weights.shape)

    assert bytes_of(kept) > bytes_of(everything) == 0
    if bits is not None:  # 8 × 8 codes of each in planes of 2 and 1 bits, and a block
        assert bytes_of(kept) <= 2 * (8 * 8 * bits // 8 + 2)


def test_a_policy_of_another_name_keeps_none_of_it():
    gate, up, y = arrays((8, 64))

    def loss(gate: jax.Array) -> jax.Array:
        return jnp.sum(y * checkpoint_name(swiglu(jnp.sin(gate), up), "other"))

    policy = jax.checkpoint_policies.save_only_these_names("other")
    few = jax.checkpoint(loss, policy=policy)
    kept = jax.tree.leaves(jax.eval_shape(lambda gate: jax.vjp(few, gate)[1], gate))
    assert not any(x.dtype in (jnp.uint4, jnp.uint8) for x in kept)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_rows_give_the_gradients_of_one_device(axis_type):
    if jax.device_count() < 4:
        pytest.skip("needs four devices, which tests/conftest.py asks for")
    inputs = arrays((64, 128))
    fn = functools.partial(gradients, functools.partial(swiglu, bits=3))
    expected = jax.jit(fn)(*inputs)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        found = jax.jit(fn)(*(jax.device_put(x, sharding) for x in inputs))
    assert_close(found, expected)
    for gradient in found:
        assert gradient.sharding.shard_shape(gradient.shape) == (16, 128)


def test_second_derivatives_and_forward_mode_are_refused_unless_exact():
    gate, up, _ = arrays((8,))
    slope = lambda fn: lambda gate: jax.grad(lambda gate: fn(gate, up).sum())(gate).sum()
    with pytest.raises(NotImplementedError, match="few-bit gated silu has no second derivatives"):
        jax.jit(jax.grad(slope(swiglu)))(gate)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jit(lambda gate: jax.jvp(lambda gate: swiglu(gate, up), (gate,), (gate,)))(gate)
    fns = functools.partial(swiglu, bits=None), PLAIN[swiglu]
    assert_close(*jax.jit(lambda gate: [jax.grad(slope(fn))(gate) for fn in fns])(gate), 100)


def test_bad_arguments_are_refused_with_what_is_right():
    gate, up, _ = arrays((4, 6))
    for bits in (0, 9, 3.0, True, "3"):
        with pytest.raises(ValueError, match=r"bits=.* must be an integer from 1 to 8, or None"):
            swiglu(gate, up, bits)
    with pytest.raises(ValueError, match=r"one shape, got \(4, 6\) and \(6,\)"):
        geglu(gate, up[0])
    with pytest.raises(TypeError, match="one floating-point dtype, got float32 and bfloat16"):
        swiglu(gate, up.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match="got int32 and int32"):
        gated(jax.nn.silu, jnp.arange(3), jnp.arange(3))


@pytest.mark.parametrize("bits", NORMAL_LEVELS)
def test_levels_are_means_of_what_they_stand_for_in_blocks_of_normal_numbers(bits):
    """Levels between thresholds halfway are the best exactly if they are such means."""
    blocks = np.random.default_rng(0).standard_normal((20_000, BLOCK_SIZE))
    sizes = (np.abs(blocks) / np.abs(blocks).max(axis=1, keepdims=True)).ravel()
    levels = np.asarray(NORMAL_LEVELS[bits])
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, sizes)
    means = np.bincount(nearest, sizes) / np.bincount(nearest)
    np.testing.assert_allclose(means, levels, atol=1e-3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_element_becomes_the_level_nearest_to_it(bits):
    x = arrays((5, 150), count=1)[0]
    found = jax.jit(lambda x: block_decode(block_encode(x, bits), x.shape, bits))(x)
    if bits in NORMAL_LEVELS:
        levels = np.concatenate([-np.asarray(NORMAL_LEVELS[bits]), NORMAL_LEVELS[bits]])
    else:
        levels = np.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1)) / (2 ** (bits - 1) - 1)
    for start in range(0, 150, BLOCK_SIZE):
        block = x[:, start : start + BLOCK_SIZE]
        scale = np.abs(block).max(axis=1).astype(jnp.bfloat16).astype(np.float32)[:, None, None]
        distances = np.abs(block[..., None] - scale * levels)
        ours = np.abs(block - found[:, start : start + BLOCK_SIZE])
        np.testing.assert_allclose(ours, distances.min(axis=-1), atol=1e-5)
