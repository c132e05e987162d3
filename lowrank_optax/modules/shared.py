"""Arrays that layers share, which their model has at hand for them while its methods run.

In a layer of a stack that a scan runs, shared arrays would be cut along the layers. So they belong
to the model, and its layers find them in a context, which each thread has its own of.
"""

from collections.abc import Hashable, Iterator, Mapping
import contextlib
import contextvars
from typing import Any, NamedTuple, TypeAlias
import weakref

import jax

from lowrank_optax.compat.nnx_context import ContextModule

Arrays: TypeAlias = Mapping[str, jax.Array]


class _Shared(NamedTuple):
    model: Any
    arrays: Mapping[Hashable, Arrays]


_shared: contextvars.ContextVar[_Shared | None] = contextvars.ContextVar("shared", default=None)


@contextlib.contextmanager
def share(model: Any, arrays: Mapping[Hashable, Arrays]) -> Iterator[None]:
    """While open, `shared_arrays` finds these arrays by their keys.

    Args:
      model: The model that they belong to, see `is_sharing`.
      arrays: The arrays of each group of layers.
    """
    token = _shared.set(_Shared(model, arrays))
    try:
        yield
    finally:
        _shared.reset(token)


def is_sharing(model: Any) -> bool:
    """Whether `share` is open for this very model."""
    shared = _shared.get()
    return shared is not None and shared.model is model


def shared_arrays(key: Hashable) -> Arrays | None:
    """The arrays of a group of layers, inside `share` of their model; else None."""
    shared = _shared.get()
    return None if shared is None else shared.arrays.get(key)


class SharingModule(ContextModule):
    """A module that reads `shared_arrays`.

    While these are there, they are part of its graph definition: a function of the layer that was
    compiled (or scanned, or rematerialised) by itself is looked up by its arguments, and must not
    be found again for other arrays.
    """

    def shared_key(self) -> Hashable | None:
        """The key of the arrays that the module shares; None if it shares none."""
        raise NotImplementedError

    def context(self) -> Hashable:
        """See `ContextModule.context`."""
        key = self.shared_key()
        arrays = None if key is None else shared_arrays(key)
        return None if arrays is None else tuple(map(_Same, arrays.values()))


class _Same:
    """An array as a key: equal to that of the very same array, as long as it lives."""

    def __init__(self, x: jax.Array) -> None:
        self._id, self._array = id(x), weakref.ref(x)

    def __hash__(self) -> int:
        return hash(self._id)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        array = self._array()
        return isinstance(other, _Same) and array is not None and array is other._array()
