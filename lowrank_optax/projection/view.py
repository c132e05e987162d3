"""How one leaf is projected: static facts that every part of the projected optimizer is told."""

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.matrices import (
    WeightDimensionNumbers,
    explicit_sharding,
    matrix_partition,
    matrix_shape,
)
from lowrank_optax.projection.rank import RankSpec, resolve_rank
from lowrank_optax.slices import CannotCutError

Side: TypeAlias = Literal["shorter", "longer", "rows", "columns", "both"]


class View(NamedTuple):
    """A leaf as a batch of matrices of which one axis is compressed.

    Attributes:
      shape: ``(*batch, m, n)``.
      axis: The compressed axis: -2 (rows, ``d = m``) or -1 (columns, ``d = n``).
      rank: Size to which it is compressed, at most ``min(m, n)``.
      dtype: Dtype of the arithmetic, float32 or float64.
      path: The leaf's path, as ``blocks/mlp/up/kernel``.
      partition: The matrix's partition, one entry an axis, on a mesh of explicit axes.
      both: Whether both axes are compressed; ``axis`` is then -2.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> view = lro.View.of(jnp.zeros((12, 64, 256)), axis=-2, rank=8)
      >>> view.length, view.projected_shape
      (64, (12, 8, 256))

    Reference:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, section 4.
    """

    shape: tuple[int, ...]
    axis: int
    rank: int
    dtype: Any = jnp.float32
    path: str = ""
    partition: PartitionSpec | None = None
    both: bool = False

    @classmethod
    def of(cls, matrix: Any, axis: int, rank: RankSpec, path: str = "") -> "View":
        """The view of a batch of matrices ``[*batch, m, n]`` as it is."""
        dtype = jnp.promote_types(matrix.dtype, jnp.float32)
        kept = resolve_rank(rank, path, tuple(matrix.shape))
        partition = explicit_sharding.partition_of(matrix)
        return cls(tuple(matrix.shape), axis, kept, dtype, path, partition)

    @property
    def batch(self) -> tuple[int, ...]:
        return self.shape[:-2]

    @property
    def length(self) -> int:
        """Size ``d`` of the compressed axis."""
        return self.shape[self.axis]

    @property
    def across(self) -> int:
        """The matrix axis that stays as it is."""
        return -3 - self.axis

    @property
    def projected_shape(self) -> tuple[int, ...]:
        if self.both:
            return (*self.batch, self.rank, self.rank)
        shape = list(self.shape)
        shape[self.axis] = self.rank
        return tuple(shape)

    def partitioned(self, *matrix_axes: Any) -> PartitionSpec | None:
        """Partition of an array with this batch and other matrix axes; None if not explicit."""
        if self.partition is None:
            return None
        return PartitionSpec(*self.partition[: len(self.batch)], *matrix_axes)

    @property
    def small_partition(self) -> PartitionSpec | None:
        """Partition of a small factor ``[*batch, d, r]``: the batch axes' alone."""
        return self.partitioned(None, None)

    @property
    def projected_partition(self) -> PartitionSpec | None:
        """Partition of the projected gradient: the kept axis stays as the gradient's."""
        if self.partition is None or self.both:
            return self.small_partition
        rows, columns = self.partition[-2:]
        return self.partitioned(*((None, columns) if self.axis == -2 else (rows, None)))


class LeafView(NamedTuple):
    """How a leaf is projected.

    Attributes:
      spec: Its dimension numbers.
      view: How the batch of matrices that they make of it is projected.
    """

    spec: WeightDimensionNumbers
    view: View

    def of_slice(self, leaf: Any) -> "LeafView":
        """How a slice along the leaf's first axis is projected.

        Raises:
          CannotCutError: If that axis is one of the matrices', not of their batch.
        """
        view, shape = self.view, matrix_shape(leaf.shape, self.spec)
        if not view.batch or shape[1:] != view.shape[1:]:
            raise CannotCutError(f"a slice of {view.path!r} is no batch of whole matrices.")
        return self._replace(
            view=view._replace(shape=shape, partition=matrix_partition(leaf, self.spec))
        )


def leaf_view(
    leaf: Any,
    spec: WeightDimensionNumbers | None,
    partition: PartitionSpec | None,
    *,
    side: Side,
    rank: RankSpec,
    path: str,
) -> LeafView | None:
    """How the leaf is projected; None for leaves that are no real matrices, or empty."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    if spec is None or math.prod(leaf.shape) == 0 or not floating:
        return None
    shape = matrix_shape(leaf.shape, spec, path)
    rows, columns = shape[-2:]
    compress_rows = {
        "shorter": rows <= columns,
        "longer": rows >= columns,
        "rows": True,
        "columns": False,
        "both": True,
    }[side]
    view = View(
        shape,
        -2 if compress_rows else -1,
        resolve_rank(rank, path, shape),
        compute_dtype(leaf.dtype),
        path,
        partition,
        side == "both",
    )
    return LeafView(spec, view)


def compute_dtype(dtype: Any) -> Any:
    """Float32 at least for floating dtypes; others stay as they are."""
    floating = jnp.issubdtype(dtype, jnp.inexact)
    return jnp.promote_types(dtype, jnp.float32) if floating else dtype


def zeros_per_matrix(view: View, dtype: Any) -> jax.Array:
    """Zeros ``[*batch]``, with the batch axes' own sharding."""
    return explicit_sharding.zeros(view.batch, dtype, view.partitioned())
