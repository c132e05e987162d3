"""Arrays whose sharding is part of their type, kept sharded on their way through matrix views.

On a mesh with explicit axes a product or reshape must be told the partition of its result where it
cannot be derived. Elsewhere (one device, or a mesh of automatic axes) partitions are None here, and
these functions are the plain jax.numpy ones.
"""

import math
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


def vary_like(x: jax.Array, like: Any) -> jax.Array:
    """``x``, varying over all axes of `jax.shard_map` over which a leaf of ``like`` varies."""
    varying = lambda a: jax.typeof(a).manual_axis_type.varying
    axes = frozenset().union(*map(varying, jax.tree.leaves(like))) - varying(x)
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def product(
    expression: str, a: jax.Array, b: jax.Array, partition: PartitionSpec | None = None
) -> jax.Array:
    """``jnp.einsum(expression, a, b)`` at full float32 precision, partitioned as told.

    The default precision of TPUs (bfloat16 passes) and of recent GPUs (TF32) costs a basis its
    orthonormality, so every product with a basis is asked for at the highest.
    """
    return jnp.einsum(expression, a, b, precision=jax.lax.Precision.HIGHEST, out_sharding=partition)


def vary_alike(*arrays: Any) -> tuple[Any, ...]:
    """The arrays, all varying over the same axes of `jax.shard_map`, for one custom derivative.

    None stays None. Gradients of those that did not vary over an axis are summed over it.
    """
    return jax.tree.map(lambda x: vary_like(x, arrays), arrays)


def in_whole_runs(x: jax.Array, axis: int, run: int) -> jax.Array:
    """``x`` with an axis gathered, on explicit axes, unless each device has whole runs of it."""
    partition = partition_of(x)
    if partition is None or partition[axis] is None:
        return x
    names = partition[axis] if isinstance(partition[axis], tuple) else (partition[axis],)
    devices = math.prod(jax.typeof(x).sharding.mesh.shape[name] for name in names)
    if x.shape[axis] % (run * devices) == 0:
        return x
    return constrain(x, PartitionSpec(*partition[:axis], None, *partition[axis + 1 :]))


def split_axis(x: jax.Array, axis: int, inner: tuple[int, ...]) -> jax.Array:
    """``[..., n, ...]`` as ``[..., k, *inner, ...]``, of which ``k`` keeps the sharding."""
    partition = partition_of(x)
    if partition is not None:
        whole = [None] * len(inner)
        partition = PartitionSpec(*partition[: axis + 1], *whole, *partition[axis + 1 :])
    size = x.shape[axis] // math.prod(inner)
    return reshape(x, (*x.shape[:axis], size, *inner, *x.shape[axis + 1 :]), partition)


def merge_axes(x: jax.Array, axis: int, count: int) -> jax.Array:
    """The inverse of `split_axis`: ``count`` axes as one, with the sharding of the first."""
    partition, end = partition_of(x), axis + count
    if partition is not None:
        whole = PartitionSpec(*partition[: axis + 1], *[None] * (count - 1), *partition[end:])
        x = constrain(x, whole)
        partition = PartitionSpec(*partition[: axis + 1], *partition[end:])
    size = math.prod(x.shape[axis:end])
    return reshape(x, (*x.shape[:axis], size, *x.shape[end:]), partition)
