"""Products of bfloat16 matrices at full float32 precision, for the price of bfloat16 ones.

A matrix unit multiplies bfloat16 numbers and adds in float32. A product of float32 matrices at the
highest precision takes six passes of it; where one matrix is bfloat16 already, three are enough.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.matrices.explicit_sharding import product


def product_with_bfloat16(
    expression: str, matrix: jax.Array, thin: jax.Array, partition: PartitionSpec | None = None
) -> jax.Array:
    """As `product`, of a bfloat16 matrix and a thin one, whose last axis the result ends with.

    On a TPU a float32 ``thin [..., k]`` is cut into bfloat16 parts, of which one that is not finite
    gives a nan; elsewhere, where bfloat16 may be slow, the matrix is cast.
    """
    if thin.dtype != jnp.float32:
        return product(expression, matrix, thin, partition)
    return jax.lax.platform_dependent(
        matrix,
        thin,
        tpu=lambda a, b: product_by_parts(expression, a, b, partition),
        default=lambda a, b: product(expression, a, b, partition),
    )


def product_by_parts(
    expression: str, matrix: jax.Array, thin: jax.Array, partition: PartitionSpec | None = None
) -> jax.Array:
    """The product with each of three bfloat16 parts of ``thin``, side by side, and their sum."""
    parts = jnp.concatenate(bfloat16_parts(thin), axis=-1)
    products = jnp.einsum(
        expression, matrix, parts, preferred_element_type=thin.dtype, out_sharding=partition
    )
    high, middle, low = jnp.split(products, 3, axis=-1)
    return high + (middle + low)


def bfloat16_parts(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three bfloat16 arrays, each 2⁻⁸ of the one before, whose sum is the float32 ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax.matrices.bfloat16 import bfloat16_parts
      >>> print(*bfloat16_parts(jnp.float32(1.2345678)))
      1.23438 0.000192642 1.19209e-07
    """

    def rounded(x: jax.Array) -> jax.Array:
        # Not a cast back and forth, which the compiler may leave out as excess precision.
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    high = rounded(x)
    middle = rounded(x - high)
    low = x - high - middle
    return high.astype(jnp.bfloat16), middle.astype(jnp.bfloat16), low.astype(jnp.bfloat16)
