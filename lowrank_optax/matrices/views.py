"""How a parameter leaf is seen as a batch of matrices, and which leaves are.

Every method of this library that treats a weight as a matrix goes through this file. A leaf of any
number of axes is described by the axes that form the rows (the inputs, contracted in ``x @ W``) and
those that form the columns (the outputs); whatever axes remain are batch axes: layers stacked by a
scan, experts, an ensemble.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple, TypeGuard

import jax
from jax.sharding import PartitionSpec

from lowrank_optax.matrices import explicit_sharding


class WeightDimensionNumbers(NamedTuple):
    """Which axes of a weight are the rows and which the columns of its matrix.

    Axes that are named in neither are batch axes, so one spec serves a single weight and a stack of
    them if it counts from the end. The same convention as optax's ``MuonDimensionNumbers`` and
    ``GaLoreDimensionNumbers``, which are accepted wherever this is.

    Attributes:
      reduction_axis: Axis or axes of the inputs, those that ``x @ W`` contracts.
      output_axis: Axis or axes of the outputs.

    Example:
      An attention projection ``[d_model, heads, head_dim]`` is a matrix of ``heads·head_dim``
      columns:

      >>> spec = WeightDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
      >>> matrix_shape((64, 8, 16), spec)
      (64, 128)

    Reference:
      Jordan et al., Muon, 2024, as it stands in ``optax.contrib``: https://optax.readthedocs.io
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1


class _Axes(NamedTuple):
    batch: tuple[int, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        return self.batch + self.reduction + self.output


def is_dimension_numbers(x: Any) -> TypeGuard[WeightDimensionNumbers]:
    """Whether ``x`` is a spec of ours or one of optax's (they share the two field names)."""
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


def _axes(shape: tuple[int, ...], spec: WeightDimensionNumbers, where: str = "") -> _Axes:
    ndim, place = len(shape), f" at {where!r}" if where else ""
    named = []
    for field in ("reduction_axis", "output_axis"):
        given = getattr(spec, field)
        given = (given,) if isinstance(given, int) else tuple(given)
        if not given or any(not -ndim <= axis < ndim for axis in given):
            raise ValueError(
                f"{field}={given}{place} does not name axes of a weight of shape {shape}: "
                f"give at least one axis between {-ndim} and {ndim - 1}."
            )
        named.append(tuple(axis % ndim for axis in given))
    reduction, output = named
    if len(set(reduction + output)) != len(reduction + output):
        raise ValueError(
            f"reduction_axis={reduction} and output_axis={output}{place} name an axis twice; "
            "an axis of a weight is either a row axis, a column axis or a batch axis."
        )
    batch = tuple(axis for axis in range(ndim) if axis not in reduction + output)
    return _Axes(batch, reduction, output)


def matrix_shape(
    shape: Sequence[int], spec: WeightDimensionNumbers, where: str = ""
) -> tuple[int, ...]:
    """Shape ``(*batch, rows, columns)`` of a weight seen as a batch of matrices.

    Args:
      shape: The weight's shape.
      spec: Its dimension numbers.
      where: The weight's path, for error messages.

    Raises:
      ValueError: If the spec names an axis that is not there, or one axis twice.

    Example:
      >>> matrix_shape((12, 512, 1376), WeightDimensionNumbers(-2, -1))
      (12, 512, 1376)

    Reference:
      The convention of ``optax.contrib.muon``: https://optax.readthedocs.io
    """
    shape = tuple(shape)
    axes = _axes(shape, spec, where)
    size = lambda names: math.prod(shape[axis] for axis in names)
    return (*(shape[a] for a in axes.batch), size(axes.reduction), size(axes.output))


def to_matrix(x: jax.Array, spec: WeightDimensionNumbers) -> jax.Array:
    """The weight ``x`` as a batch of matrices ``[*batch, rows, columns]``, dtype unchanged.

    Args:
      x: A weight, or its gradient, of any number of axes ≥ 2.
      spec: Its dimension numbers.

    Returns:
      An array of shape ``matrix_shape(x.shape, spec)``. On a mesh of explicit axes a matrix axis
      keeps the sharding of the first axis it was made from.

    Raises:
      ValueError: If the spec names an axis that is not there, or one axis twice.

    Example:
      >>> import jax.numpy as jnp
      >>> heads = jnp.arange(24.0).reshape(4, 2, 3)
      >>> to_matrix(heads, WeightDimensionNumbers(0, (1, 2))).shape
      (4, 6)

    Reference:
      The convention of ``optax.contrib.muon``: https://optax.readthedocs.io
    """
    axes = _axes(x.shape, spec)
    matrix = x if axes.order == tuple(range(x.ndim)) else x.transpose(axes.order)
    shape = matrix_shape(x.shape, spec)
    if matrix.shape == shape:
        return matrix
    return explicit_sharding.reshape(matrix, shape, matrix_partition(x, spec))


def from_matrix(matrix: jax.Array, spec: WeightDimensionNumbers, param: jax.Array) -> jax.Array:
    """The inverse of `to_matrix`: an array of ``param``'s shape (and explicit sharding).

    Args:
      matrix: An array ``[*batch, rows, columns]``.
      spec: The dimension numbers of the weight.
      param: The weight, or anything with its shape.

    Example:
      >>> import jax.numpy as jnp
      >>> spec, heads = WeightDimensionNumbers(0, (1, 2)), jnp.arange(24.0).reshape(4, 2, 3)
      >>> bool((from_matrix(to_matrix(heads, spec), spec, heads) == heads).all())
      True

    Reference:
      The convention of ``optax.contrib.muon``: https://optax.readthedocs.io
    """
    axes = _axes(param.shape, spec)
    order = axes.order
    permuted = tuple(param.shape[axis] for axis in order)
    partition = explicit_sharding.partition_of(param)
    if matrix.shape != permuted:
        target = None if partition is None else PartitionSpec(*(partition[a] for a in order))
        matrix = explicit_sharding.reshape(matrix, permuted, target)
    inverse = tuple(order.index(axis) for axis in range(len(order)))
    weight = matrix if inverse == tuple(range(len(order))) else matrix.transpose(inverse)
    return explicit_sharding.constrain(weight, partition)


def matrix_partition(x: jax.Array, spec: WeightDimensionNumbers) -> PartitionSpec | None:
    """Partition of `to_matrix`'s result on an explicit mesh; None elsewhere."""
    partition = explicit_sharding.partition_of(x)
    if partition is None:
        return None
    axes = _axes(x.shape, spec)
    return PartitionSpec(
        *(partition[a] for a in axes.batch), partition[axes.reduction[0]], partition[axes.output[0]]
    )
