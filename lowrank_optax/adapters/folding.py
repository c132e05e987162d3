"""Folding changes into weights, whatever model these are in: stacks of matrices in, stacks out."""

from collections.abc import Sequence
import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

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
    changes, exact = [], w.astype(jnp.float32)
    for (method, strength), mine, ours in zip(methods, own, shared, strict=True):
        p = {**mine, **ours}
        change = strength * method.delta(p, w)
        if method.changes_base and strength != 1:  # it is the original weight that is changed
            change += (1 - strength) * (method.original(p, exact) - exact)
        changes.append(change)
    return sum(changes[1:], changes[0])


def depends_on_weight(method: Adapter) -> bool:
    """Whether the change is a function of the weight: such a method has its own `unmerged`."""
    return type(method).unmerged is not Adapter.unmerged


def check_can_unmerge(path: str, named: Sequence[tuple[str, Adapter, float]]) -> None:
    """Raises ValueError if adapters merged together could not be taken out of the weight again.

    Args:
      path: Of the layer.
      named: All that would be merged: names, methods and strengths.
    """
    for name, method, strength in named:
        kind = type(method).__name__
        if depends_on_weight(method) and (len(named) > 1 or strength != 1):
            raise ValueError(
                f"the change of {kind} {name!r} of {path} depends on the weight, so it can "
                "be merged only by itself and at strength 1."
            )
