"""Affine codes: evenly spaced between a group's extremes, zero among them."""

from typing import Any

from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.quantization import Affine, BlockFormat, code_map, dequantize, quantize

GROUP = 8
SHAPES = [(5,), (3, 20), (6, 3), (2, 5, 16)]
bits_of_codes = pytest.mark.parametrize("bits", [8, 4])


def affine(bits: Any, block_size: int = GROUP) -> BlockFormat:
    return BlockFormat(code_map("affine", bits), block_size)


def there(x: Any, bits: Any) -> Affine:
    return quantize(jnp.asarray(x), affine(bits))


def back(q: Affine, shape: tuple[int, ...], bits: Any) -> jax.Array:
    return dequantize(q, affine(bits), shape)


@bits_of_codes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_at_most_half_a_step_and_zero_is_exact(
    shape: tuple[int, ...], bits: Any
) -> None:
    rows = (-1, shape[-1]) if shape[-1] >= GROUP else (1, -1)

    @settings(max_examples=10, deadline=None)
    @given(
        seed=st.integers(0, 2**31),
        offset=st.sampled_from([0.0, 3.0, -100.0]),
        scale=st.sampled_from([1e-30, 1.0, 1e30]),
    )
    def check(seed: int, offset: float, scale: float) -> None:
        rng = np.random.default_rng(seed)
        x = ((rng.normal(size=shape) + offset) * scale).astype(np.float32)
        x[rng.random(shape) < 0.2] = 0
        q = there(x, bits)
        error = np.abs(np.asarray(back(q, shape, bits), np.float64) - x)
        assert not error[x == 0].any()
        for row, errors in zip(x.reshape(rows), error.reshape(rows), strict=True):
            for start in range(0, len(row), GROUP):
                group = slice(start, start + GROUP)
                spread = max(row[group].max(), 0.0) - min(row[group].min(), 0.0)
                assert errors[group].max() <= spread / (2**bits - 1) * (0.5 + 1e-3)

    check()


@bits_of_codes
def test_rounding_at_random_keeps_the_expectation_even_of_the_extremes(bits: Any) -> None:
    x = np.random.default_rng(0).normal(size=(6, GROUP)).astype(np.float32)
    x[1] = np.abs(x[1])
    x[2] = -np.abs(x[2])
    x[3, :4] = [-3.5, 11.5, 0, 1e-3]
    count = 4000

    def mean(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        fmt = affine(bits)
        one = lambda key: dequantize(quantize(x, fmt, key), fmt, x.shape)
        drawn = jax.vmap(one)(keys)
        return jnp.mean(drawn, 0), jnp.max(jnp.abs(drawn - x), 0)

    found, worst = jax.jit(mean)(jax.random.split(jax.random.key(0), count))
    step = (np.maximum(x.max(1), 0) - np.minimum(x.min(1), 0)) / (2**bits - 2)
    assert (np.asarray(worst) <= step[:, None] * 1.001).all()
    # Five standard deviations of a mean of coin tosses.
    allowed = 5 * 0.5 * step[:, None] / np.sqrt(count) + 1e-6
    np.testing.assert_array_less(np.abs(np.asarray(found) - x), np.broadcast_to(allowed, x.shape))


@bits_of_codes
def test_groups_of_one_number_are_exact(bits: Any) -> None:
    x = np.repeat(np.float32([0.3, -2.0, 0.0, 1e30, 3e38, -3e38]), GROUP)
    found = back(there(x, bits), x.shape, bits)
    assert_close(found, x)


def test_a_group_over_the_whole_range_of_float32_stays_finite() -> None:
    x = np.float32([-3e38, 0.0, 1e38, 3e38])
    found = np.asarray(back(there(x, 8), x.shape, 8))
    np.testing.assert_allclose(found, x, rtol=0, atol=3e36)


def test_what_is_not_finite_is_stored_as_zero_and_does_not_touch_its_group() -> None:
    x = np.float32([1, 2, np.nan, -4, np.inf, 0, -np.inf, 3])
    found = np.asarray(back(there(x, 8), x.shape, 8))
    np.testing.assert_allclose(found, np.where(np.isfinite(x), x, 0), rtol=0, atol=0.5 * 7 / 255)


@bits_of_codes
def test_types_and_bytes(bits: Any) -> None:
    q = jax.eval_shape(
        lambda x: quantize(x, affine(bits, 256)), jnp.zeros((512, 1000), jnp.bfloat16)
    )
    assert q.codes.dtype == q.zeros.dtype == jnp.uint8
    assert (q.codes.size, q.scales.shape, q.zeros.shape) == (512 * 1000 * bits // 8,) + 2 * (
        (512, 4),
    )


def test_options_that_an_affine_map_does_not_have_are_refused() -> None:
    x, fmt = jnp.zeros((2, GROUP)), affine(8)
    for other in (fmt._replace(positive=True), fmt._replace(scale_dtype=jnp.bfloat16)):
        with pytest.raises(ValueError, match="an affine map takes neither"):
            quantize(x, other)
    with pytest.raises(ValueError, match="an affine map takes neither"):
        quantize(x, fmt, None, jnp.ones((2, 1)))
