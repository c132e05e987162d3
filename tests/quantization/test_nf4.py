"""NF4 weights: the blocks and levels of QLoRA, and their bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax.quantization import code_map, nf4_dequantize, nf4_quantize, nf4_round, unpack
from tests.quantization.tables import table


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
    found = np.asarray(nf4_round(jnp.asarray(weights)))
    matrices = weights.reshape(-1, *shape[-2:])
    expected = np.stack([rounded(w) for w in matrices]).reshape(shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_levels_are_the_published_ones() -> None:
    levels = np.asarray(code_map("nf4", 4).decode(jnp.arange(16)))
    published = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1]
    np.testing.assert_allclose(levels, published, atol=5e-8)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_weight_takes_four_and_a_half_bits(layers: int) -> None:
    q = nf4_quantize(jnp.ones((layers, 128, 64)))
    assert (q.codes.dtype, q.scales.dtype) == (jnp.uint8, jnp.float32)
    assert 8 * (q.codes.nbytes + q.scales.nbytes) == 4.5 * layers * 128 * 64


def test_zero_blocks_are_zero_and_have_the_code_of_zero() -> None:
    weights = jnp.zeros((64, 2)).at[:, 1].set(-3.0)
    q = nf4_quantize(weights)
    codes = np.asarray(unpack(q.codes, (2, 64)))
    assert (codes[0] == 7).all()
    assert (codes[1] == 0).all()
    np.testing.assert_array_equal(nf4_dequantize(q, weights.shape), weights)


def test_rounded_weights_have_the_same_codes_and_scales_again() -> None:
    """So the base of a QPiSSA is stored without loss, and in bfloat16 keeps its codes."""
    weights = jax.random.normal(jax.random.key(0), (2, 80, 24))
    first = nf4_quantize(weights)
    base = nf4_dequantize(first, weights.shape)
    again = nf4_quantize(base)
    np.testing.assert_array_equal(first.codes, again.codes)
    np.testing.assert_array_equal(first.scales, again.scales)
    np.testing.assert_array_equal(first.codes, nf4_quantize(base.astype(jnp.bfloat16)).codes)


def test_bfloat16_weights_are_rounded_like_their_float32_values() -> None:
    weights = jax.random.normal(jax.random.key(1), (64, 4), jnp.bfloat16)
    np.testing.assert_array_equal(nf4_round(weights), nf4_round(weights.astype(jnp.float32)))


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"weights of shape \(3,\)"):
        nf4_quantize(jnp.ones(3))
    with pytest.raises(ValueError, match="block_size=0"):
        nf4_quantize(jnp.ones((2, 2)), block_size=0)
    with pytest.raises(ValueError, match="map='nf4'"):
        code_map("nf4", 8)
    with pytest.raises(ValueError, match="map='nf4'"):
        code_map("nf4", 4, signed=False)
