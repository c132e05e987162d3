"""Adapters on weights that are sharded over a mesh: their arrays are sharded as the weights are.

A method says which axes of its arrays are the weight's inputs and outputs (`Adapter.axes`). These
have the sharding of the weight's inputs and outputs, and the axes of a stack that of the stack; the
others are whole on every device. So ``A [d_in, r]`` is cut as the contracted axis of the weight is,
and ``B [r, d_out]`` as its output axis.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lowrank_optax.adapters.adapted_layers import (
    AdapterConstant,
    AdapterParam,
    spec_of,
    weight_variable,
)
from lowrank_optax.adapters.base import Adapter, AdapterParams, Side, Weights
from lowrank_optax.adapters.groups import init_group
from lowrank_optax.matrices.views import WeightDimensionNumbers


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


def check_arrays(
    methods: Sequence[Adapter], weights: Sequence[Weights], embeddings: Sequence[bool]
) -> None:
    """Checks that a group of layers can have such adapters, before any is attached.

    Nothing is computed: the arrays' shapes are found by ``jax.eval_shape``. Where they depend on
    the weights' values, nothing is checked.

    Args:
      methods: The method of each layer.
      weights: Their weights, or the shapes alone.
      embeddings: Which layers are embeddings.

    Raises:
      ValueError: If the axes that a method declares are not those of its arrays.
      Exception: What the method raises where it cannot be attached to such weights.
    """
    if not all(method.has_static_shapes for method in methods):
        return
    init = lambda key, weights: init_group(key, methods, weights, embeddings)
    shared, own = jax.eval_shape(init, jax.random.key(0), list(weights))
    of_layers = zip((shared, *own), (methods[0], *methods), (weights[0], *weights), strict=True)
    for params, method, weight in of_layers:
        sizes = dict(zip(("in", "out"), weight.shape[1:], strict=True))
        for name, x in (params.trainable | params.frozen).items():
            sides = method.axes.get(name, ())
            last = x.shape[x.ndim - len(sides) :]
            if len(sides) > x.ndim or any(
                side is not None and sizes.get(side) != size
                for side, size in zip(sides, last, strict=True)
            ):
                raise ValueError(
                    f"{type(method).__name__}.axes says that the last axes of {name!r} are {sides} "
                    f"of a weight {tuple(weight.shape[1:])}, but its shape is {x.shape}."
                )


def matrix_sharding(layer: Any) -> MatrixSharding:
    """How a layer's weight is sharded, as its metadata and its value say."""
    variable, spec = weight_variable(layer), spec_of(layer).axes
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
    params: AdapterParams,
    axes: Mapping[str, tuple[Side, ...]],
    sharding: MatrixSharding,
    batch: int = 0,
) -> dict[str, nnx.Variable]:
    """An adapter's arrays as Variables, sharded as the weight is.

    Args:
      params: The arrays.
      axes: What the method says of them.
      sharding: Sharding of the weight.
      batch: How many leading axes of the arrays are batch axes of the weight.
    """
    kinds = ((AdapterParam, params.trainable), (AdapterConstant, params.frozen))
    return {
        name: _variable(kind, x, axes.get(name, ()), sharding, batch)
        for kind, arrays in kinds
        for name, x in arrays.items()
    }


def _variable(
    kind: type[nnx.Variable],
    x: jax.Array,
    sides: tuple[Side, ...],
    sharding: MatrixSharding,
    batch: int,
) -> nnx.Variable:
    metadata: dict[str, Any] = {}
    if sharding.names is not None:
        named = _of_array(sharding.names, sides, batch, x.ndim)
        metadata = {"out_sharding": named, "eager_sharding": False, **sharding.metadata}
    if sharding.mesh is not None and sharding.spec is not None:
        entries = _of_array(sharding.spec, sides, batch, x.ndim)
        x = jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec(*entries)))
    return kind(x, **metadata)


def _of_matrix(entries: tuple[Any, ...], spec: WeightDimensionNumbers) -> tuple[Any, ...]:
    """Entries of ``[*batch, d_in, d_out]``: an axis made of several has the first one's."""
    rows, columns = jax.tree.leaves(spec[:1]), jax.tree.leaves(spec[1:])
    ndim = len(entries)
    named = {axis % ndim for axis in (*rows, *columns)}
    batch = [entries[axis] for axis in range(ndim) if axis not in named]
    return (*batch, entries[rows[0]], entries[columns[0]])


def _of_array(
    entries: tuple[Any, ...], sides: tuple[Side, ...], batch: int, ndim: int
) -> tuple[Any, ...]:
    *_, of_inputs, of_outputs = entries
    of_sides = {"in": of_inputs, "out": of_outputs, None: None}
    found: list[Any] = [*entries[:batch], *[None] * (ndim - batch)]
    for axis, side in enumerate(sides, ndim - len(sides)):
        if of_sides[side] not in found:  # an axis of the mesh cuts one axis of an array
            found[axis] = of_sides[side]
    return tuple(found)
