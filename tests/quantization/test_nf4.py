"""NF4 weights: the blocks and levels of QLoRA, and their bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.quantization import code_map, nf4_dequantize, nf4_quantize, nf4_round, unpack
from tests.quantization.tables import table

quantized = jax.jit(nf4_quantize)
dequantized = jax.jit(nf4_dequantize, static_argnums=1)
round_trip = jax.jit(nf4_round)


def rounded(weights: np.ndarray, block: int = 64) -> np.ndarray:
    """One matrix in NumPy float64: rows of PyTorch's layout end to end, blocks of 64."""
    levels = table("nf4", 4, True)
    flat, result = weights.T.ravel().astype(np.float64), []
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        scale = np.abs(part).max() or 1.0
        nearest = np.abs(part[:, None] / scale - levels).argmin(1)
        result.append(levels[nearest] * scale if np.any(part) else 0 * part)
    return np.concatenate(result).reshape(weights.T.shape).T


@pytest.mark.parametrize("shape", [(64, 6), (5, 7), (130, 3), (3, 2, 48, 10)])
def test_weights_are_rounded_as_blocks_of_pytorch_rows(shape: tuple[int, ...]) -> None:
    weights = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = np.asarray(round_trip(weights))
    matrices = weights.reshape(-1, *shape[-2:])
    expected = np.stack([rounded(w) for w in matrices]).reshape(shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_levels_are_the_published_ones() -> None:
    levels = np.asarray(jax.jit(code_map("nf4", 4).decode)(np.arange(16)))
    published = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1]
    np.testing.assert_allclose(levels, published, atol=5e-8)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_weight_takes_four_and_a_half_bits(layers: int) -> None:
    q = quantized(np.ones((layers, 128, 64), np.float32))
    assert (q.codes.dtype, q.scales.dtype) == (jnp.uint8, jnp.float32)
    assert 8 * (q.codes.nbytes + q.scales.nbytes) == 4.5 * layers * 128 * 64


def test_zero_blocks_are_zero_and_have_the_code_of_zero() -> None:
    weights = np.float32([[0, -3]] * 64)
    q = quantized(weights)
    codes = np.asarray(unpack((q.codes,), (2, 64), 4, "rows"))
    assert (codes[0] == 7).all()
    assert (codes[1] == 0).all()
    np.testing.assert_array_equal(dequantized(q, weights.shape), weights)


def test_rounded_weights_have_the_same_codes_and_scales_again() -> None:
    """So the base of a QPiSSA is stored without loss, and in bfloat16 keeps its codes."""
    weights = np.random.default_rng(0).normal(size=(2, 80, 24)).astype(np.float32)
    first = quantized(weights)
    base = dequantized(first, weights.shape)
    again = quantized(base)
    np.testing.assert_array_equal(first.codes, again.codes)
    np.testing.assert_array_equal(first.scales, again.scales)
    in_bfloat16 = quantized(np.asarray(base).astype(jnp.bfloat16))
    np.testing.assert_array_equal(first.codes, in_bfloat16.codes)


def test_bfloat16_weights_are_rounded_like_their_float32_values() -> None:
    weights = np.random.default_rng(1).normal(size=(64, 4)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(round_trip(weights), round_trip(weights.astype(np.float32)))


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"weights of shape \(3,\)"):
        nf4_quantize(jnp.ones(3))
    with pytest.raises(ValueError, match="block_size=0"):
        nf4_quantize(jnp.ones((2, 2)), block_size=0)
    with pytest.raises(ValueError, match="map='nf4'"):
        code_map("nf4", 8)
    with pytest.raises(ValueError, match="map='nf4'"):
        code_map("nf4", 4, signed=False)
