"""Arrays that layers share, lent to them by the model while its methods run.

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


class _Loan(NamedTuple):
    lender: Any
    groups: _Groups


_loan: contextvars.ContextVar[_Loan | None] = contextvars.ContextVar("loan", default=None)


def lent_arrays(name: str, group: str) -> Mapping[str, jax.Array] | None:
    """The arrays of an adapter's group, if they are lent at the moment."""
    loan = _loan.get()
    return None if loan is None else loan.groups.get((name, group))


@contextlib.contextmanager
def lend(model: Any, borrowers: list[Any]) -> Iterator[None]:
    """While open, layers find the arrays that they share.

    Args:
      model: The owner of ``adapter_groups``.
      borrowers: The adapters that share them. Each is marked with what it was lent, since functions
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
        before = [(borrower, borrower.lent) for borrower in borrowers]
        for borrower in borrowers:
            arrays = groups[borrower.name, borrower.group].values()
            _mark(borrower, tuple(map(_Same, arrays)))
        token = _loan.set(_Loan(model, groups))
        try:
            yield
        finally:
            _loan.reset(token)
            for borrower, mark in before:
                _mark(borrower, mark)


def is_lending(model: Any) -> bool:
    """Whether this very model is lending at the moment."""
    loan = _loan.get()
    return loan is not None and loan.lender is model


# One for all models: those that call each other in two threads would wait for ever with two.
_lock = threading.RLock()


def _mark(borrower: Any, mark: "tuple[_Same, ...] | None") -> None:
    # Not setattr: no state changes, so it may be done inside a transformation of a closure, too.
    vars(borrower)["lent"] = mark


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
