"""Adapters on weights that are sharded over a mesh: their arrays are sharded as the weights are.

An array's axis of the size of the inputs has the sharding of the weight's inputs, and likewise for
the outputs and for the axes of a stack; the others are whole on every device. So ``A [d_in, r]`` is
cut as the contracted axis of the weight is, and ``B [r, d_out]`` as its output axis.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any, NamedTuple, TypeAlias

from flax import nnx
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lowrank_optax.adapters.base import Adapter, AdapterParams, Weights
from lowrank_optax.adapters.groups import init_group
from lowrank_optax.adapters.nnx import (
    AdapterConstant,
    AdapterParam,
    placed,
    weight_variable,
)
from lowrank_optax.matrices.views import WeightDimensionNumbers


class Axes(NamedTuple):
    """Which axes of an array, counted from its end, are a weight's inputs and outputs."""

    inputs: int | None
    outputs: int | None


class MatrixSharding(NamedTuple):
    """How a weight seen as ``[*batch, d_in, d_out]`` is sharded; entries of a ``PartitionSpec``.

    Attributes:
      names: As its metadata say, by names of axes that rules may map to those of a mesh.
      mesh: The mesh that it is on.
      spec: As it is on that mesh.
      metadata: What else there is to know, such as those rules.
    """

    names: tuple[Any, ...] | None
    mesh: Mesh | AbstractMesh | None
    spec: tuple[Any, ...] | None
    metadata: Mapping[str, Any]


_Described: TypeAlias = tuple[tuple[tuple[int, ...], Any], ...]


def axes_of_arrays(
    methods: Sequence[Adapter], weights: Sequence[Weights], embeddings: Sequence[bool]
) -> dict[str, Axes]:
    """The axes of all arrays of a group of layers, found by doubling a weight's sides.

    Raises:
      Exception: What the method raises where it cannot be attached to such weights.
    """
    described = tuple((tuple(w.shape), w.dtype) for w in weights)
    return _axes_of_arrays(tuple(methods), described, tuple(embeddings))


@functools.lru_cache(maxsize=256)
def _axes_of_arrays(
    methods: tuple[Adapter, ...], described: _Described, embeddings: tuple[bool, ...]
) -> dict[str, Axes]:
    usual, wide, tall = (
        _shapes(methods, described, embeddings, scale) for scale in ((1, 1), (2, 1), (1, 2))
    )

    def changed(name: str, other: Mapping[str, tuple[int, ...]]) -> int | None:
        shape = usual[name]
        pairs = enumerate(zip(shape, other.get(name, shape), strict=True))
        return next((axis - len(shape) for axis, (a, b) in pairs if b == 2 * a), None)

    return {name: Axes(changed(name, wide), changed(name, tall)) for name in usual}


def _shapes(
    methods: tuple[Adapter, ...],
    described: _Described,
    embeddings: tuple[bool, ...],
    scale: tuple[int, int],
) -> dict[str, tuple[int, ...]]:
    """The shapes of a group's arrays by name, where its weights' sides are scaled."""
    weights = [
        jax.ShapeDtypeStruct((layers, scale[0] * d_in, scale[1] * d_out), dtype)
        for (layers, d_in, d_out), dtype in described
    ]
    init = lambda key, weights: init_group(key, methods, weights, embeddings)
    shared, own = jax.eval_shape(init, jax.random.key(0), weights)
    return {
        name: x.shape
        for params in (shared, *own)
        for name, x in (params.trainable | params.frozen).items()
    }


def matrix_sharding(layer: Any) -> MatrixSharding:
    """How a layer's weight is sharded, as its metadata and its value say."""
    variable, (spec, _) = weight_variable(layer), placed(layer)
    metadata, value = variable.get_metadata(), variable.get_value()
    names = metadata.get("out_sharding")
    names = getattr(names, "spec", names)  # a NamedSharding's
    if names is not None:
        names = _of_matrix((None,) * (value.ndim - len(names)) + tuple(names), spec)
    known = {key: metadata[key] for key in ("sharding_rules", "mesh") if key in metadata}
    sharding = None if isinstance(value, jax.core.Tracer) else getattr(value, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return MatrixSharding(names, None, None, known)
    whole = (*sharding.spec, *[None] * (value.ndim - len(sharding.spec)))
    return MatrixSharding(names, sharding.mesh, _of_matrix(whole, spec), known)


def variables(
    params: AdapterParams, axes: Mapping[str, Axes], sharding: MatrixSharding, batch: int = 0
) -> dict[str, nnx.Variable]:
    """An adapter's arrays as Variables, sharded as the weight is.

    Args:
      params: The arrays.
      axes: Of each.
      sharding: Of the weight.
      batch: How many leading axes of the arrays are batch axes of the weight.
    """
    kinds = ((AdapterParam, params.trainable), (AdapterConstant, params.frozen))
    return {
        name: _variable(kind, x, axes[name], sharding, batch)
        for kind, arrays in kinds
        for name, x in arrays.items()
    }


def _variable(
    kind: type[nnx.Variable], x: jax.Array, axes: Axes, sharding: MatrixSharding, batch: int
) -> nnx.Variable:
    metadata: dict[str, Any] = {}
    if sharding.names is not None:
        named = _of_array(sharding.names, axes, batch, x.ndim)
        metadata = {"out_sharding": named, "eager_sharding": False, **sharding.metadata}
    if sharding.mesh is not None and sharding.spec is not None:
        entries = _of_array(sharding.spec, axes, batch, x.ndim)
        x = jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec(*entries)))
    return kind(x, **metadata)


def _of_matrix(entries: tuple[Any, ...], spec: WeightDimensionNumbers) -> tuple[Any, ...]:
    """Entries of ``[*batch, d_in, d_out]``: an axis made of several has the first one's."""
    rows, columns = jax.tree.leaves(spec[:1]), jax.tree.leaves(spec[1:])
    ndim = len(entries)
    named = {axis % ndim for axis in (*rows, *columns)}
    batch = [entries[axis] for axis in range(ndim) if axis not in named]
    return (*batch, entries[rows[0]], entries[columns[0]])


def _of_array(entries: tuple[Any, ...], axes: Axes, batch: int, ndim: int) -> tuple[Any, ...]:
    found: list[Any] = [*entries[:batch], *[None] * (ndim - batch)]
    *_, of_inputs, of_outputs = entries
    if axes.inputs is not None:
        found[axes.inputs] = of_inputs
    if axes.outputs is not None and of_outputs not in found:
        found[axes.outputs] = of_outputs
    return tuple(found)
