"""How one leaf is projected: its matrices, their compressed axis, and the rank."""

from collections.abc import Callable, Mapping
import math
import operator
import re
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
from lowrank_optax.matrices.paths import compiled_pattern
from lowrank_optax.slices import CannotCutError

Side: TypeAlias = Literal["shorter", "longer", "rows", "columns", "both"]
RankSpec: TypeAlias = (
    int | float | Callable[[str, tuple[int, ...]], int | float] | Mapping[str, int | float]
)


class View(NamedTuple):
    """A leaf as a batch of matrices of which one axis is compressed.

    Attributes:
      shape: Shape ``(*batch, m, n)`` of the matrices.
      axis: Compressed axis: -2 (rows, ``d = m``) or -1 (columns, ``d = n``).
      rank: Size to which it is compressed, at most ``min(m, n)``.
      dtype: Dtype of the arithmetic, float32 or float64.
      path: Path of the leaf, as ``blocks/mlp/up/kernel``.
      partition: Partition of the matrices, one entry per axis, on a mesh with explicit axes.
      both: Whether both axes are compressed; ``axis`` is then -2.
      spec: Dimension numbers that make matrices of the leaf; None for a leaf that is matrices.

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
    spec: Any = None

    @classmethod
    def of(cls, matrix: Any, axis: int, rank: RankSpec, path: str = "") -> "View":
        """The view of a batch of matrices ``[*batch, m, n]`` as it is."""
        shape, partition = tuple(matrix.shape), explicit_sharding.partition_of(matrix)
        rank = resolve_rank(rank, path, shape)
        dtype = jnp.promote_types(matrix.dtype, jnp.float32)
        return cls(shape, axis, rank, dtype, path, partition)

    @property
    def batch(self) -> tuple[int, ...]:
        return self.shape[:-2]

    @property
    def length(self) -> int:
        """Size ``d`` of the compressed axis."""
        return self.shape[self.axis]

    @property
    def across(self) -> int:
        """The matrix axis that is not compressed."""
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
        """Partition of the projected gradient: the other axis has the gradient's."""
        if self.partition is None or self.both:
            return self.small_partition
        rows, columns = self.partition[-2:]
        return self.partitioned(*((None, columns) if self.axis == -2 else (rows, None)))

    def of_slice(self, leaf: Any) -> "View":
        """The view of a slice along the leaf's first axis.

        Raises:
          CannotCutError: If that axis belongs to the matrices and not to their batch.
        """
        shape = matrix_shape(leaf.shape, self.spec)
        if not self.batch or shape[1:] != self.shape[1:]:
            raise CannotCutError(f"a slice of {self.path!r} is no batch of whole matrices.")
        return self._replace(shape=shape, partition=matrix_partition(leaf, self.spec))


def view_of_leaf(
    leaf: Any, spec: WeightDimensionNumbers | None, *, side: Side, rank: RankSpec, path: str
) -> View | None:
    """How a leaf is projected; None for leaves that are no real matrices, or empty."""
    if spec is None or not math.prod(leaf.shape) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    shape, partition = matrix_shape(leaf.shape, spec, path), matrix_partition(leaf, spec)
    rows, columns = shape[-2:]
    compress_rows = {"shorter": rows <= columns, "longer": rows >= columns, "columns": False}
    axis = -2 if compress_rows.get(side, True) else -1
    rank, dtype = resolve_rank(rank, path, shape), compute_dtype(leaf.dtype)
    return View(shape, axis, rank, dtype, path, partition, side == "both", spec)


def compute_dtype(dtype: Any) -> Any:
    """Float32 at least for floating dtypes; others stay as they are."""
    floating = jnp.issubdtype(dtype, jnp.inexact)
    return jnp.promote_types(dtype, jnp.float32) if floating else dtype


def over_batch(function: Callable[..., Any], batch_ndim: int) -> Callable[..., Any]:
    """The function of single matrices, mapped over the batch axes of its arguments."""
    for _ in range(batch_ndim):
        function = jax.vmap(function)
    return function


def zeros_per_matrix(view: View, dtype: Any) -> jax.Array:
    """Zeros ``[*batch]``, with the sharding of the batch axes."""
    return explicit_sharding.zeros(view.batch, dtype, view.partitioned())


def check_rank(rank: RankSpec) -> RankSpec:
    """Returns the rank as it was given, or raises `TypeError` or `ValueError`."""
    if isinstance(rank, Mapping):
        for pattern, value in rank.items():
            compiled_pattern("rank", pattern)
            _check_number(value, f"rank[{pattern!r}]")
    elif not callable(rank):
        _check_number(rank, "rank")
    return rank


def resolve_rank(rank: RankSpec, path: str, shape: tuple[int, ...]) -> int:
    """The rank of one matrix ``[*batch, m, n]``: an int from 1 to ``min(m, n)``.

    Args:
      rank: An int; a fraction of the smaller side (0 < fraction < 1, rounded up); a function of
        ``(path, shape)`` that returns one of these; or a mapping from patterns to them, of which
        the first whose pattern is found in the path (``re.search``) holds.
      path: Path of the leaf, as ``blocks/mlp/up/kernel``.
      shape: Shape of the matrix.

    Raises:
      ValueError: If no pattern is found in the path, or a number is out of range.
      TypeError: If it is of another type.

    Example:
      >>> resolve_rank({"attention": 4, ".*": 0.25}, "blocks/mlp/up/kernel", (64, 256))
      16
    """
    if isinstance(rank, Mapping):
        value = next((v for pattern, v in rank.items() if re.search(pattern, path)), None)
        if value is None:
            raise ValueError(
                f"rank={dict(rank)!r} has no pattern for {path!r}; end it with {{'.*': rank}}."
            )
    else:
        value = rank(path, shape) if callable(rank) else rank
    value = _check_number(value, f"rank of {path!r}" if path else "rank")
    smaller = min(shape[-2:])
    if isinstance(value, float):
        # Less a hair: 0.07 · 100 is 7.000000000000001, which is 7.
        value = max(1, math.ceil(value * smaller - 1e-6))
    return min(value, smaller)


def _check_number(value: Any, name: str) -> int | float:
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name}={value} is an array, but it fixes shapes and must be a Python number; under "
            "optax.inject_hyperparams, list it in static_args."
        )
    if isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a number.")
    if isinstance(value, float):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value!r} must be an int, or a fraction between 0 and 1.")
        return value
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name}={value!r} must be an int, a fraction, a mapping from patterns to these, or a "
            "function of path and shape."
        ) from None
    if number < 1:
        raise ValueError(f"{name}={value!r} must be at least 1.")
    return number
