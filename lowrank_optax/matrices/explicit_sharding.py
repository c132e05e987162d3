"""Arrays whose sharding is part of their type, kept sharded on their way through matrix views.

On a mesh with explicit axes a product or reshape must be told the partition of its result where it
cannot be derived. Elsewhere (one device, or a mesh of automatic axes) partitions are None here, and
these functions are the plain jax.numpy ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec


def partition_of(x: Any) -> PartitionSpec | None:
    """Partition of ``x``, one entry an axis, if its mesh has explicit axes; otherwise None."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return None
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return PartitionSpec(*sharding.spec, *[None] * (jnp.ndim(x) - len(sharding.spec)))


def partition_of_batch(matrix: Any, *matrix_axes: Any) -> PartitionSpec | None:
    """Partition of the batch axes of ``matrix [*batch, m, n]``, then the entries given.

    The partition of what is computed from a batch of matrices, one for each; None where sharding is
    not explicit.
    """
    partition = partition_of(matrix)
    return None if partition is None else PartitionSpec(*partition[:-2], *matrix_axes)


def reshape(x: jax.Array, shape: tuple[int, ...], partition: PartitionSpec | None) -> jax.Array:
    """``x.reshape(shape)``, partitioned as told."""
    return jax.lax.reshape(x, shape, out_sharding=partition)


def constrain(x: jax.Array, partition: PartitionSpec | None) -> jax.Array:
    """``x`` itself, or resharded where it is partitioned otherwise on an explicit mesh."""
    if partition is None or partition_of(x) == partition:
        return x
    return jax.sharding.reshard(x, partition)


def zeros(shape: tuple[int, ...], dtype: Any, partition: PartitionSpec | None) -> jax.Array:
    """Zeros, partitioned as told."""
    return jnp.zeros(shape, dtype, out_sharding=partition)


def product(
    expression: str, a: jax.Array, b: jax.Array, partition: PartitionSpec | None = None
) -> jax.Array:
    """``jnp.einsum(expression, a, b)`` at full float32 precision, partitioned as told.

    The default precision of TPUs (bfloat16 passes) and of recent GPUs (TF32) costs a basis its
    orthonormality, so every product with a basis is asked for at the highest.
    """
    return jnp.einsum(expression, a, b, precision=jax.lax.Precision.HIGHEST, out_sharding=partition)
