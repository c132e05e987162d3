"""Arrays of any size in a few bits for the backward pass: blocks of 64, bfloat16 scales."""

import inspect

import jax
import jax.numpy as jnp

from lowrank_optax.quantization import BlockFormat, Quantized, code_map, dequantize, quantize

BLOCK_SIZE = 64

# Not jitted by themselves: a backward pass would be given their constants as arrays.
_quantize, _dequantize = inspect.unwrap(quantize), inspect.unwrap(dequantize)


def block_encode(x: jax.Array, bits: int) -> Quantized:
    """Codes of a float array of any shape; elements that are not finite become zero."""
    return _quantize(x, _format(bits))


def block_decode(coded: Quantized, shape: tuple[int, ...], bits: int) -> jax.Array:
    """The float32 array of this shape that codes stand for."""
    return _dequantize(coded, _format(bits), shape)


def codes_name(name: str, bits: int) -> str:
    """What codes of a tensor are called for ``jax.checkpoint``: ``mlp_gate_4_bits``."""
    return f"{name}_{bits}_bits"


def check_bits(bits: int | None, name: str = "bits") -> None:
    """Refuse anything but a number of bits, or None to store arrays as they are."""
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    if bits is not None and not (whole and 1 <= bits <= 8):
        raise ValueError(f"{name}={bits!r} must be an integer from 1 to 8, or None.")


def _format(bits: int) -> BlockFormat:
    # From 5 bits on, evenly spaced levels are as good as the best ones.
    levels = code_map("normal" if bits <= 4 else "linear", bits)
    return BlockFormat(levels, BLOCK_SIZE, scale_dtype=jnp.bfloat16, packing="auto")
