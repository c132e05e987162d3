"""Folding changes into weights, whatever model these are in: stacks of matrices in, stacks out."""

from collections.abc import Sequence
import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.base import Adapter, Arrays
from lowrank_optax.matrices.printing import printed

if TYPE_CHECKING:
    from rich.table import Table


Methods = tuple[tuple[Adapter, float], ...]
"""Methods with their strengths."""


class MergedLayer(NamedTuple):
    """What merging did to one layer, or one stack of layers.

    Attributes:
      path: Its path, as ``blocks/attention/query``.
      rounding_error: Largest absolute difference of its weights from the float32 sum; 0 for
        float32 weights. A float32 scalar.
      relative_size: ``|change| / |weight|``, Frobenius norms over the stack; likewise.
    """

    path: str
    rounding_error: jax.Array
    relative_size: jax.Array


class MergeReport:
    """Printed, a table of `MergedLayer`.

    Attributes:
      rows: One a layer, or stack of layers.
    """

    def __init__(self, rows: list[MergedLayer]) -> None:
        self.rows = rows

    def __rich__(self) -> "Table":
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        table.add_column("path", overflow="fold")
        table.add_column("rounding error", justify="right")
        table.add_column("relative size of change", justify="right")
        for row in self.rows:
            table.add_row(row.path, f"{row.rounding_error:.1e}", f"{row.relative_size:.1e}")
        return table

    def __str__(self) -> str:
        return printed(self)

    __repr__ = __str__


@functools.partial(jax.jit, static_argnums=0)
def folded(
    methods: Methods, stack: jax.Array, own: tuple[Arrays, ...], shared: tuple[Arrays, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Merged weights, the largest rounding error, and the relative size of the change."""

    def one(args: tuple[jax.Array, tuple[Arrays, ...]]) -> tuple[jax.Array, ...]:
        w, arrays = args
        change = _change(methods, w, arrays, shared)
        exact = w.astype(jnp.float32) + change
        rounded = exact.astype(w.dtype)
        error = jnp.max(jnp.abs(exact - rounded.astype(jnp.float32)), initial=0.0)
        return rounded, error, jnp.sum(change**2), jnp.sum(w.astype(jnp.float32) ** 2)

    merged, errors, changes, weights = jax.lax.map(one, (stack, own))
    size = jnp.sqrt(jnp.sum(changes) / jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float32).tiny))
    return merged, jnp.max(errors, initial=0.0), size


@functools.partial(jax.jit, static_argnums=0)
def unfolded(
    methods: Methods, stack: jax.Array, own: tuple[Arrays, ...], shared: tuple[Arrays, ...]
) -> jax.Array:
    """The weights before `folded`."""

    def one(args: tuple[jax.Array, tuple[Arrays, ...]]) -> jax.Array:
        w, arrays = args
        if depends_on_weight(methods[0][0]):
            return methods[0][0].unmerged({**arrays[0], **shared[0]}, w)
        change = _change(methods, w, arrays, shared)
        return (w.astype(jnp.float32) - change).astype(w.dtype)

    return jax.lax.map(one, (stack, own))


def _change(
    methods: Methods, w: jax.Array, own: tuple[Arrays, ...], shared: tuple[Arrays, ...]
) -> jax.Array:
    """The sum of the adapters' changes of one weight, float32."""
    changes = []
    for (method, strength), mine, ours in zip(methods, own, shared, strict=True):
        p = {**mine, **ours}
        changes.append(strength * method.delta(p, w))
        removed = None if strength == 1 else method.removed_weight(p)
        if removed is not None:
            changes.append((1 - strength) * removed)
    return sum(changes[1:], changes[0])


@functools.partial(jax.jit, static_argnums=0)
def checksum(strength: float, own: Arrays, shared: Arrays) -> jax.Array:
    """A number for each layer that tells whether what was merged is what would be unmerged.

    Args:
      strength: Strength of the adapter.
      own: Arrays of the layers ``[L, ...]``.
      shared: Arrays that all layers use.

    Returns:
      uint32 ``[L]``: equal bits give equal numbers, on any device and sharding.
    """
    start = np.float32(strength).view(np.uint32)
    together = sum((_bit_sum(x, 0) for _, x in sorted(shared.items())), jnp.uint32(start))
    for _, x in sorted(own.items()):
        together = jnp.uint32(31) * together + _bit_sum(x, 1)
    return together


def _bit_sum(x: jax.Array, batch: int) -> jax.Array:
    """A sum of the bits of all but the leading axes, each element with an odd factor of its own."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    x = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, bits)
    place = jnp.uint32(0)
    for axis in range(batch, x.ndim):
        index = jnp.arange(x.shape[axis], dtype=jnp.uint32)
        place = place * jnp.uint32(x.shape[axis]) + index.reshape(-1, *[1] * (x.ndim - axis - 1))
    factors = place * jnp.uint32(0x9E3779B2) + jnp.uint32(1)
    return jnp.sum(x.astype(jnp.uint32) * factors, axis=range(batch, x.ndim), dtype=jnp.uint32)


def check_unchanged(path: str, name: str, before: jax.Array, now: jax.Array) -> None:
    """Raises ValueError if an adapter's checksum is no longer that of the time it was merged.

    Under a transformation, where the numbers are not known, nothing is checked.
    """
    if isinstance(before, jax.core.Tracer) or isinstance(now, jax.core.Tracer):
        return
    if not np.array_equal(np.asarray(before).reshape(-1), np.asarray(now).reshape(-1)):
        raise ValueError(
            f"the arrays or the strength of the adapter {name!r} of {path} have changed since it "
            "was merged, so its change cannot be taken out of the weight again: put back those of "
            "that time, or detach the adapter and load the original weights."
        )


def depends_on_weight(method: Adapter) -> bool:
    """Whether the change is a function of the weight: such a method has its own `unmerged`."""
    return type(method).unmerged is not Adapter.unmerged


def check_can_unmerge(path: str, named: Sequence[tuple[str, Adapter, float]]) -> None:
    """Checks that adapters can be merged together, and taken out of the weight again.

    Args:
      path: Of the layer.
      named: All that would be merged: names, methods and strengths.

    Raises:
      TypeError: If a method has no matrix to add to the weight.
      ValueError: If one depends on the weight and is not merged alone at strength 1.
    """
    for name, method, strength in named:
        kind = type(method).__name__
        if not method.has_delta:
            raise TypeError(
                f"{kind} {name!r} of {path} cannot be merged: its change depends on the layer's "
                "input, so no matrix can be added to the weight instead. Leave it attached."
            )
        if depends_on_weight(method) and (len(named) > 1 or strength != 1):
            raise ValueError(
                f"the change of {kind} {name!r} of {path} depends on the weight, so it can "
                "be merged only by itself and at strength 1."
            )
