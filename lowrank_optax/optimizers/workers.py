"""Data-parallel workers with weights of their own: devices on a mesh axis, or groups in turn."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import optax

from lowrank_optax.matrices.paths import path_string
from lowrank_optax.states.precision import to_float32

AxisName: TypeAlias = str | tuple[str, ...]


def _names(axes: Any) -> set[str]:
    """The names in an axis name, or in an entry of a ``PartitionSpec``."""
    return {axes} if isinstance(axes, str) else set(axes or ())


def refuse_sharded(params: Any, axis_name: AxisName | None) -> None:
    """Refuses parameters that, outside of ``shard_map``, are sharded over the workers' axis."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sharding = getattr(leaf, "sharding", None)
        entries = sharding.spec if isinstance(sharding, NamedSharding) else ()
        if any(_names(entry) & _names(axis_name) for entry in entries):
            raise ValueError(_sharded(path_string(path), axis_name))


def own_weights(params: Any, axis_name: AxisName | None) -> Any:
    """The parameters as the worker's own: their gradients are not summed over workers."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not _names(axis_name) & set(manual):  # one worker, or `jax.vmap` with an axis name
        return params

    def own(path: Any, leaf: jax.Array) -> jax.Array:
        try:
            return jax.lax.pcast(leaf, axis_name, to="varying")
        except ValueError as error:
            raise ValueError(_sharded(path_string(path), axis_name)) from error

    return jax.tree_util.tree_map_with_path(own, params)


def _sharded(path: str, axis_name: AxisName | None) -> str:
    return (
        f"params are sharded over the axis of the workers, axis_name={axis_name!r}, at {path!r}; "
        "they must be replicated over it: every worker extrapolates all of its weights to a point "
        "of its own. For parameters sharded over the data axis (FSDP), use variant='past_global' "
        "or 'same' under jit, without axis_name and shard_map."
    )


def worker_keys(key: jax.Array, axis_name: AxisName | None, groups: int | None) -> jax.Array:
    """A key for the worker, or each group here: the same however workers lie on devices."""
    device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    if groups is None:
        return jax.random.fold_in(key, device)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, device * groups + jnp.arange(groups))


def number_of_workers(
    workers: int | None, axis_name: AxisName | None, local_groups: int | None
) -> int:
    """The number of workers on all devices."""
    groups = local_groups or 1
    if workers is None and axis_name is not None:
        raise ValueError(
            f"workers is missing: give the size of the axis {axis_name!r} of the mesh, "
            f"times local_groups ({groups})."
        )
    workers = groups if workers is None else workers
    if workers < 1 or workers % groups or (axis_name is None and workers != groups):
        raise ValueError(
            f"workers={workers} does not fit local_groups={local_groups} and "
            f"axis_name={axis_name!r}: it is the size of that axis of the mesh times local_groups."
        )
    return workers


def own_gradients(previous: Any, params: Any, groups: int | None) -> Any:
    """The last gradients of the workers here: ``[groups, ...]``, or as the parameters for one."""

    def own(path: Any, gradient: jax.Array, weight: jax.Array) -> jax.Array:
        leading = gradient.shape[: gradient.ndim - weight.ndim]
        fits = leading in ((), (1,)) if groups is None else leading == (groups,)
        if not fits or gradient.shape[len(leading) :] != weight.shape:
            here = "one worker" if groups is None else f"local_groups={groups} workers"
            raise ValueError(
                f"the state has gradients of the shape {gradient.shape} at {path_string(path)!r}, "
                f"where the parameter is {weight.shape}; there is {here} here. Make it by "
                "init(params, workers=...), and give it to shard_map with state_specs()."
            )
        return gradient if groups is not None else gradient.reshape(weight.shape)

    return jax.tree_util.tree_map_with_path(own, previous, params)


def over_groups(
    worker: Callable[..., tuple[Any, Any, Any]], params: Any, groups: int, inputs: Any
) -> tuple[Any, Any, Any]:
    """Runs ``worker(*inputs) -> (value, gradient, saved)`` for groups in turn.

    Inputs are trees of arrays ``[groups, ...]``; returns the stacked values, the mean of the
    gradients, and the stacked saved trees.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
        if jnp.shape(leaf)[:1] != (groups,):
            raise ValueError(
                f"with local_groups={groups}, positional arguments of the loss need a first axis "
                f"of {groups}; an array at {path_string(path)!r} has the shape {jnp.shape(leaf)}. "
                "Pass by keyword what all groups share."
            )

    def body(total: Any, group: Any) -> tuple[Any, Any]:
        value, gradient, saved = worker(*group)
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradient)
        return total, (value, saved)

    zeros = optax.tree.zeros_like(to_float32(params))
    total, (values, saved) = jax.lax.scan(body, zeros, inputs, length=groups)
    average = jax.tree.map(lambda t, w: (t / groups).astype(w.dtype), total, params)
    return values, average, saved
