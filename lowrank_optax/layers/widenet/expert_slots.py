"""Tokens brought to their experts' slots and back, on one device or by an all-to-all of many."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec


def slots_of(experts: jax.Array, visible: jax.Array, num_experts: int, capacity: int) -> jax.Array:
    """The slot of each choice, int32 ``[T, K]``: ``e * capacity + rank``, or ``E * capacity``.

    The rank is that of the token among those that choose the expert, in their order; choices
    beyond the capacity, and those of tokens that are not visible, get the last number, for none.
    """
    chosen = (experts[..., None] == jnp.arange(num_experts)).any(axis=1) & visible[:, None]
    rank = jnp.cumsum(chosen, axis=0, dtype=jnp.int32) - 1
    rank = jnp.take_along_axis(rank, experts, axis=1)
    kept = visible[:, None] & (rank < capacity)
    return jnp.where(kept, experts * capacity + rank, num_experts * capacity)


def to_slots(x: jax.Array, slots: jax.Array, num_experts: int, capacity: int) -> jax.Array:
    """The tokens in their slots, ``[E, capacity, d]``; empty slots are 0."""
    tokens, choices = slots.shape
    numbers = jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), choices)
    empty = jnp.full(num_experts * capacity, tokens, jnp.int32)
    token = empty.at[slots.reshape(-1)].set(numbers, mode="drop")
    return _gather(x, token).reshape(num_experts, capacity, x.shape[1])


def from_slots(out: jax.Array, slots: jax.Array, gates: jax.Array) -> jax.Array:
    """The sum of each token's results with its gates as weights, float32 ``[T, d]``."""
    rows = out.reshape(-1, out.shape[-1])
    # One choice after the other: all of them together would be K times the tokens.
    parts = [gates[:, k, None] * _gather(rows, slots[:, k]) for k in range(slots.shape[1])]
    return functools.reduce(jnp.add, parts)


def _gather(rows: jax.Array, index: jax.Array) -> jax.Array:
    return rows.at[index].get(mode="fill", fill_value=0)


class OneDevice:
    """Slots of all tokens together."""

    groups = 1

    def send(
        self, x: jax.Array, experts: jax.Array, visible: jax.Array, count: int, capacity: int
    ) -> tuple[jax.Array, jax.Array]:
        """The tokens in their slots, and the slots."""
        slots = slots_of(experts, visible, count, capacity)
        return to_slots(x, slots, count, capacity), slots

    def receive(self, out: jax.Array, slots: jax.Array, gates: jax.Array) -> jax.Array:
        """The results of the tokens."""
        return from_slots(out, slots, gates)


class Exchange:
    """Slots of each device's own tokens, exchanged by an all-to-all over the experts' axis.

    The tokens are divided over all axes of the mesh, the experts over one.
    """

    def __init__(self, mesh: AbstractMesh, axis: str) -> None:
        self._mesh, self._axis, self.groups = mesh, axis, mesh.size
        others = tuple(name for name in mesh.axis_names if name != axis)
        self._tokens, self._slots = PartitionSpec(mesh.axis_names), PartitionSpec(axis, others)

    def send(
        self, x: jax.Array, experts: jax.Array, visible: jax.Array, count: int, capacity: int
    ) -> tuple[jax.Array, jax.Array]:
        """The tokens in their slots ``[E, groups * capacity, d]``, and the slots."""

        def local(x: jax.Array, experts: jax.Array, visible: jax.Array) -> Any:
            slots = slots_of(experts, visible, count, capacity)
            own = to_slots(x, slots, count, capacity)
            return jax.lax.all_to_all(own, self._axis, 0, 1, tiled=True), slots

        out = self._slots, self._tokens
        return self._on_each(local, (self._tokens,) * 3, out)(x, experts, visible)

    def receive(self, out: jax.Array, slots: jax.Array, gates: jax.Array) -> jax.Array:
        """The results of the tokens."""

        def local(out: jax.Array, slots: jax.Array, gates: jax.Array) -> jax.Array:
            out = jax.lax.all_to_all(out, self._axis, 1, 0, tiled=True)
            return from_slots(out, slots, gates)

        specs = self._slots, self._tokens, self._tokens
        return self._on_each(local, specs, self._tokens)(out, slots, gates)

    def _on_each(self, local: Any, in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(local, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs)


def transport(axis: str | None, count: int, x: jax.Array) -> OneDevice | Exchange:
    """How tokens come to experts that are distributed over a mesh axis, or to those of one device.

    Raises:
      ValueError: If there is no such axis in the current mesh, its axes are not automatic, or the
        experts or the tokens do not divide over it, or the tokens are sharded over explicit axes.
    """
    mesh, tokens = jax.sharding.get_abstract_mesh(), len(x)
    if axis is not None and axis not in mesh.axis_names:
        names = ", ".join(mesh.axis_names) or "none: there is no mesh"
        raise ValueError(
            f"expert_axis={axis!r} is not an axis of the current mesh ({names}): run under "
            "jax.set_mesh(mesh), with a mesh that has this axis."
        )
    automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    if not automatic and (axis is not None or any(jax.typeof(x).sharding.spec)):
        raise ValueError(
            f"tokens are exchanged over automatic axes alone, not over {mesh.axis_types}: give "
            "jax.make_mesh axis_types of AxisType.Auto, or call the mixture in "
            "jax.sharding.auto_axes."
        )
    if axis is None:
        return OneDevice()
    if count % mesh.shape[axis]:
        raise ValueError(
            f"num_experts={count} does not divide over the {mesh.shape[axis]} devices of the mesh "
            f"axis {axis!r}: give a multiple of them, or an axis that divides them."
        )
    if tokens % mesh.size:
        raise ValueError(
            f"{tokens} tokens do not divide over the {mesh.size} devices of the mesh, which each "
            "route their own with expert_axis: give a multiple of them."
        )
    return Exchange(mesh, axis)
