"""Weights in NF4, the 4 bits of QLoRA: what QPiSSA's base is rounded to and stored as."""

import math

import jax
import jax.numpy as jnp

from lowrank_optax.quantization.blocks import BlockFormat, Quantized, dequantize, quantize
from lowrank_optax.quantization.maps import code_map

NF4_BLOCK = 64


def nf4_quantize(weights: jax.Array, block_size: int = NF4_BLOCK) -> Quantized:
    r"""Codes of 4 bits and a float32 scale for each block of weights: 4.5 bits a weight.

    With levels :math:`q` and blocks :math:`w` of 64 weights: :math:`s = \max |w|`,
    :math:`c = \arg\min_k |w / s - q_k|`. Blocks are cut as bitsandbytes cuts them, from each
    matrix on its own: from the rows, one after the other, of PyTorch's ``[d_out, d_in]``, the
    transpose of the kernels here; so the weights of a block belong to one output, or to a few.

    Args:
      weights: ``[..., d_in, d_out]``, of any float dtype.
      block_size: Weights to a scale.

    Returns:
      ``codes``, uint8 ``[..., ceil(blocks / 2), block_size]``, two to a byte (of an odd number of
      blocks half a byte is spare), and ``scales``, float32 ``[..., blocks, 1]``.

    Raises:
      ValueError: If ``weights`` is no matrix, or ``block_size`` below 1.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from lowrank_optax.quantization import nf4_dequantize, nf4_quantize
      >>> weights = jnp.array([[2.0, -0.1], [0.5, 0.4]])
      >>> q = nf4_quantize(weights, block_size=2)
      >>> print(q.codes.shape, q.scales.ravel())
      (1, 2) [2.  0.4]
      >>> print(np.asarray(nf4_dequantize(q, weights.shape, block_size=2)).round(3))
      [[ 2.    -0.114]
       [ 0.492  0.4  ]]

    Reference:
      Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E.
    """
    if weights.ndim < 2:
        raise ValueError(f"weights of shape {weights.shape} must be matrices [..., d_in, d_out].")
    if block_size < 1:
        raise ValueError(f"block_size={block_size!r} must be at least 1.")
    batch, size = weights.shape[:-2], math.prod(weights.shape[-2:])
    blocks = -(-size // block_size)
    spare = [(0, 0)] * len(batch) + [(0, blocks * block_size - size)]
    rows = jnp.pad(weights.mT.reshape(*batch, size), spare).reshape(*batch, blocks, block_size)
    return quantize(rows, BlockFormat(code_map("nf4", 4), block_size))


def nf4_dequantize(
    quantized: Quantized, shape: tuple[int, ...], block_size: int = NF4_BLOCK
) -> jax.Array:
    """The float32 weights ``shape`` that codes and scales of `nf4_quantize` stand for."""
    *batch, d_in, d_out = shape
    blocks = -(-d_in * d_out // block_size)
    fmt = BlockFormat(code_map("nf4", 4), block_size)
    rows = dequantize(quantized, fmt, (*batch, blocks, block_size))
    flat = rows.reshape(*batch, blocks * block_size)[..., : d_in * d_out]
    return flat.reshape(*batch, d_out, d_in).mT


def nf4_round(weights: jax.Array, block_size: int = NF4_BLOCK) -> jax.Array:
    """The float32 numbers that NF4 has for weights; for those again, it has the very same."""
    return nf4_dequantize(nf4_quantize(weights, block_size), weights.shape, block_size)
