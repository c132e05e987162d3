"""Arrays that layers share, which the model has at hand for them while its methods run.

In a layer of a stack run by a scan, shared arrays would be cut along the layers. So they belong to
the model `attach` was given, as ``model.adapter_groups``, and its layers find them in a context.
"""

from collections.abc import Iterator, Mapping
import contextlib
import contextvars
import threading
from typing import Any, NamedTuple, TypeAlias
import weakref

import jax

_Groups: TypeAlias = Mapping[tuple[str, str], Mapping[str, jax.Array]]


class _Shared(NamedTuple):
    model: Any
    groups: _Groups


_shared: contextvars.ContextVar[_Shared | None] = contextvars.ContextVar("shared", default=None)


def shared_arrays(name: str, group: str) -> Mapping[str, jax.Array] | None:
    """The arrays of an adapter's group, inside `share` of their model; else None."""
    shared = _shared.get()
    return None if shared is None else shared.groups.get((name, group))


@contextlib.contextmanager
def share(model: Any, adapters: list[Any]) -> Iterator[None]:
    """While open, layers find the arrays that they share.

    Args:
      model: The owner of ``adapter_groups``.
      adapters: The adapters that share them. Each is marked with its shared arrays, since functions
        of a layer that are compiled (or scanned, or rematerialised) by themselves are looked up by
        their arguments and would be found again for other arrays.
    """
    groups = {
        (name, group): {k: v[...] for k, v in arrays.items()}
        for name, of_adapter in getattr(model, "adapter_groups", {}).items()
        for group, arrays in of_adapter.items()
    }
    # The marks are on the models' own layers: one thread after the other.
    with _lock:
        before = [(adapter, adapter.shared) for adapter in adapters]
        for adapter in adapters:
            arrays = groups[adapter.name, adapter.group].values()
            _mark(adapter, tuple(map(_Same, arrays)))
        token = _shared.set(_Shared(model, groups))
        try:
            yield
        finally:
            _shared.reset(token)
            for adapter, mark in before:
                _mark(adapter, mark)


def is_sharing(model: Any) -> bool:
    """Whether `share` is open for this very model."""
    shared = _shared.get()
    return shared is not None and shared.model is model


# One for all models: those that call each other in two threads would wait for ever with two.
_lock = threading.RLock()


def _mark(adapter: Any, mark: "tuple[_Same, ...] | None") -> None:
    # Not setattr: no state changes, so it may be done inside a transformation of a closure, too.
    vars(adapter)["shared"] = mark


class _Same:
    """An array as a key: equal to that of the very same array, as long as it lives."""

    def __init__(self, x: jax.Array) -> None:
        self._place, self._array = id(x), weakref.ref(x)

    def __hash__(self) -> int:
        return hash(self._place)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        array = self._array()
        return isinstance(other, _Same) and array is not None and array is other._array()
