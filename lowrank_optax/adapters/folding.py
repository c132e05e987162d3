"""Folding adapters into the weights they change, and taking them out again."""

from collections.abc import Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.base import Adapter, Arrays, rounded_to
from lowrank_optax.modules.report import Report, Table
from lowrank_optax.modules.spec import has_other_weights
from lowrank_optax.modules.wrap import own_class


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


class MergeReport(Report):
    """A table of `MergedLayer`.

    Attributes:
      rows: One a layer, or stack of layers.
    """

    def __init__(self, rows: list[MergedLayer]) -> None:
        self.rows = rows

    def table(self) -> Table:
        """One row a layer."""
        columns = ("path", ">rounding error", ">relative size of change")
        cells = [(r.path, f"{r.rounding_error:.1e}", f"{r.relative_size:.1e}") for r in self.rows]
        return Table(columns, cells)


class Folding(NamedTuple):
    """Adapters to be folded into the weights of one stack of layers, whatever model it is in.

    Attributes:
      path: Path of the layer.
      names: Names of the adapters.
      methods: Each method with its strength.
      weights: ``[L, d_in, d_out]``.
      batch: Sizes of the axes that are one here, with the product ``L``.
      own: Arrays of each adapter, ``[*batch, ...]``.
      shared: Arrays of each adapter that all layers use.
    """

    path: str
    names: tuple[str, ...]
    methods: tuple[tuple[Adapter, float], ...]
    weights: jax.Array
    batch: tuple[int, ...]
    own: tuple[Arrays, ...]
    shared: tuple[Arrays, ...]

    def folded(self) -> tuple[jax.Array, MergedLayer]:
        """The merged weights ``[L, d_in, d_out]``, and what merging did."""
        merged, error, size = _folded(self.methods, self.weights, self._flat_own(), self.shared)
        return merged, MergedLayer(self.path, error, size)

    def unfolded(self) -> jax.Array:
        """The weights before `folded`."""
        return _unfolded(self.methods, self.weights, self._flat_own(), self.shared)

    def original(self) -> jax.Array:
        """The weights as they were before the one adapter, which changed them, was attached."""
        ((method, _),), (own,), (shared,) = self.methods, self._flat_own(), self.shared
        one = lambda p, w: method.original({**p, **shared}, w)
        return jax.vmap(one)(own, self.weights)

    def checksums(self) -> dict[str, jax.Array]:
        """A number for each layer by adapter, uint32 ``[*batch]``: what was merged.

        Equal bits give equal numbers, on any device and sharding.
        """
        layers = self.weights.shape[:1]
        whole = lambda x: jnp.broadcast_to(x, layers).reshape(self.batch)
        both = zip(self.names, self.methods, self._flat_own(), self.shared, strict=True)
        return {
            name: whole(_checksum(strength, own, shared))
            for name, (_, strength), own, shared in both
        }

    def check_unchanged(self, before: Mapping[str, jax.Array]) -> None:
        """Raises ValueError if an adapter's checksum is not what it was when it was merged.

        Likewise if the weights cannot be computed from the merged ones. Under a transformation,
        where the numbers are not known, nothing is checked.
        """
        for name, now in self.checksums().items():
            if isinstance(before[name], jax.core.Tracer) or isinstance(now, jax.core.Tracer):
                continue
            if np.array_equal(np.ravel(before[name]), np.ravel(now)):
                continue
            raise ValueError(
                f"the arrays or the strength of the adapter {name!r} of {self.path} have changed "
                "since it was merged, so its change cannot be taken out of the weight again: put "
                "back those of that time, or detach the adapter and load the original weights."
            )
        if self.methods[0][0].depends_on_weight:
            check_invertible(self.path, self.methods[0][0], self.unfolded())

    def _flat_own(self) -> tuple[Arrays, ...]:
        batch = len(self.batch)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[batch:]), self.own)


@functools.partial(jax.jit, static_argnums=0)
def _folded(
    methods: tuple[tuple[Adapter, float], ...],
    weights: jax.Array,
    own: tuple[Arrays, ...],
    shared: tuple[Arrays, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Merged weights ``[L, ...]``, the largest rounding error, the relative size of the change."""

    def one(args: tuple[jax.Array, tuple[Arrays, ...]]) -> tuple[jax.Array, ...]:
        w, arrays = args
        change = _change(methods, w, arrays, shared)
        if _by_itself(methods):
            rounded, error = methods[0][0].merged({**arrays[0], **shared[0]}, w)
        else:
            rounded, error = rounded_to(w.dtype, w.astype(jnp.float32) + change)
        return rounded, error, jnp.sum(change**2), jnp.sum(w.astype(jnp.float32) ** 2)

    merged, errors, changes, sizes = jax.lax.map(one, (weights, own))
    size = jnp.sqrt(jnp.sum(changes) / jnp.maximum(jnp.sum(sizes), jnp.finfo(jnp.float32).tiny))
    return merged, jnp.max(errors, initial=0.0), size


@functools.partial(jax.jit, static_argnums=0)
def _unfolded(
    methods: tuple[tuple[Adapter, float], ...],
    weights: jax.Array,
    own: tuple[Arrays, ...],
    shared: tuple[Arrays, ...],
) -> jax.Array:
    def one(args: tuple[jax.Array, tuple[Arrays, ...]]) -> jax.Array:
        w, arrays = args
        if _by_itself(methods):
            return methods[0][0].unmerged({**arrays[0], **shared[0]}, w)
        change = _change(methods, w, arrays, shared)
        return (w.astype(jnp.float32) - change).astype(w.dtype)

    return jax.lax.map(one, (weights, own))


def _by_itself(methods: tuple[tuple[Adapter, float], ...]) -> bool:
    """Whether `Adapter.merged` and `Adapter.unmerged` of one method apply, at strength 1."""
    return len(methods) == 1 and methods[0][1] == 1


def _change(
    methods: tuple[tuple[Adapter, float], ...],
    w: jax.Array,
    own: tuple[Arrays, ...],
    shared: tuple[Arrays, ...],
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
def _checksum(strength: float, own: Arrays, shared: Arrays) -> jax.Array:
    start = np.float32(strength).view(np.uint32)
    together = sum((_bit_sum(x, 0) for _, x in sorted(shared.items())), jnp.uint32(start))
    for _, x in sorted(own.items()):
        together = jnp.uint32(31) * together + _bit_sum(x, 1)
    return together


def _bit_sum(x: jax.Array, batch: int) -> jax.Array:
    """A sum of the bits of all but the leading axes, each element with an odd factor of its own."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    x = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, bits)
    index = jnp.uint32(0)
    for axis in range(batch, x.ndim):
        along = jnp.arange(x.shape[axis], dtype=jnp.uint32)
        index = index * jnp.uint32(x.shape[axis]) + along.reshape(-1, *[1] * (x.ndim - axis - 1))
    factors = index * jnp.uint32(0x9E3779B2) + jnp.uint32(1)
    return jnp.sum(x.astype(jnp.uint32) * factors, axis=range(batch, x.ndim), dtype=jnp.uint32)


def needs_weight(method: Adapter) -> bool:
    """Whether a layer's weight is read or changed while this is attached."""
    return method.reads_weights or method.changes_base or method.depends_on_weight


def check_call(layer: Any, methods: Sequence[Adapter], path: Sequence[str] = ("a layer",)) -> None:
    """Raises TypeError if a change that depends on the weight would be computed from another.

    Args:
      layer: The layer, which may multiply by other weights since `attach`.
      methods: Those that are active in it.
      path: Path of the layer.
    """
    reading = [type(method).__name__ for method in methods if method.depends_on_weight]
    if reading and has_other_weights(layer):
        use, cls = f"{reading[0]} reads", own_class(layer).__name__
        raise other_weights_error("/".join(path), use, cls)


def other_weights_error(path: str, use: str, cls: str) -> TypeError:
    """The error for a layer that multiplies by another weight than its parameter.

    Args:
      path: Path of the layer.
      use: What the weight is needed for: "PiSSA reads".
      cls: Name of the class that computes another weight.
    """
    return TypeError(
        f"{path or 'the model'}: {use} the layer's weight, but the call of {cls} may multiply by "
        "another weight than the parameter. If it multiplies by the parameter itself, write "
        "`plain_weights = True` into the class that defines the call, or set it on the function "
        "(`dot_general`, `einsum_op`, ...) that the layer was given. Else make the parameters the "
        "weights first (a Powerpropagation layer by `change_alpha(1.0)`; in Linen by "
        "`lro.layers.powerprop(params, alpha, where)` and a module with `alpha=1`), or leave an "
        "adapter that is only added to the output (LoRA) unmerged."
    )


def check_invertible(path: str, method: Adapter, weights: jax.Array) -> None:
    """Raises ValueError if the weights before merging are NaN, as where a change is singular."""
    if not isinstance(weights, jax.core.Tracer) and bool(jnp.isnan(weights).any()):
        raise ValueError(
            f"the change that {type(method).__name__} made to the weight of {path} has no inverse, "
            "so the weight before it cannot be computed: detach the adapter and load the original "
            "weights."
        )


def check_can_unmerge(path: str, together: list[tuple[str, Adapter, float]]) -> None:
    """Checks that adapters can be merged together, and taken out of the weight again.

    Args:
      path: Path of the layer.
      together: Names, methods and strengths of all that would be merged.

    Raises:
      TypeError: If a method has no matrix to add to the weight.
      ValueError: If one depends on the weight and is not merged alone at strength 1.
    """
    for name, method, strength in together:
        if not method.has_delta:
            raise TypeError(
                f"{type(method).__name__} {name!r} of {path} cannot be merged: its change depends "
                "on the layer's input, so no matrix can be added to the weight instead. Leave it "
                "attached."
            )
        if method.depends_on_weight and (len(together) > 1 or strength != 1):
            raise ValueError(
                f"the change of {type(method).__name__} {name!r} of {path} depends on the weight, "
                "so it can be merged only by itself and at strength 1."
            )
