"""Orthonormal transforms along rows: Hadamard's, by matrix products, and the cosine transform."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_RADIX = 6  # factors of 64 x 64: few passes over the array, and sizes that matrix units like


def hadamard_transform(x: jax.Array, precision: Any = None) -> jax.Array:
    """H·x/√B' of x [B, N], below which zeros are added up to B', the next power of two.

    As the Kronecker product of small matrices: B'·N·(log2(B')/6)·128 operations.
    """
    exponent = max(len(x) - 1, 0).bit_length()
    count = 2**exponent
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mixed = jnp.pad(x, ((0, count - len(x)), (0, 0)))
    done = 0
    while done < exponent:
        bits = min(_RADIX, exponent - done)
        mixed = mixed.reshape(2**done, 2**bits, -1)
        matrix = jnp.asarray(_hadamard(bits), mixed.dtype)
        mixed = jnp.einsum(
            "ij,ajb->aib", matrix, mixed, precision=precision, preferred_element_type=wide
        )
        done += bits
    return mixed.reshape(count, -1).astype(wide) * count**-0.5


def cosine_transform(x: jax.Array) -> jax.Array:
    """The orthonormal DCT-II of each column of x [B, N], float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.scipy.fft.dct(wide, axis=0, norm="ortho")


def _hadamard(bits: int) -> np.ndarray:
    """Sylvester's matrix of size 2**bits, of 1 and -1."""
    index = np.arange(2**bits)
    common = index[:, None] & index
    odd = np.zeros_like(common)
    for bit in range(bits):
        odd ^= (common >> bit) & 1
    return 1.0 - 2.0 * odd
