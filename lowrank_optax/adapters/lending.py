"""Arrays that layers share, lent to them by the model while its methods run.

In a layer of a stack run by a scan, shared arrays would be cut along the layers. So they belong to
the model `attach` was given, as ``model.adapter_groups``, and its layers find them in a context.
"""

from collections.abc import Iterator, Mapping
import contextlib
import contextvars
import itertools
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
    before = [(borrower, borrower.lent) for borrower in borrowers]
    for borrower in borrowers:
        _mark(borrower, _numbers(groups[borrower.name, borrower.group]))
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


def _mark(borrower: Any, mark: tuple[int, ...] | None) -> None:
    # Not setattr: no state changes, so it may be done inside a transformation of a closure, too.
    vars(borrower)["lent"] = mark


_count = itertools.count()
_known: dict[int, tuple[weakref.ref[Any], int]] = {}


def _numbers(arrays: Mapping[str, jax.Array]) -> tuple[int, ...]:
    """A number for each array: the same for the same array, as long as it lives."""
    return tuple(_number(x) for x in arrays.values())


def _number(x: jax.Array) -> int:
    if isinstance(x, jax.core.Tracer):
        return next(_count)
    place = id(x)
    known = _known.get(place)
    if known is None or known[0]() is not x:
        forget = lambda ref: _known.pop(place, None) if _is_of(place, ref) else None
        known = _known[place] = weakref.ref(x, forget), next(_count)
    return known[1]


def _is_of(place: int, ref: weakref.ref[Any]) -> bool:
    return place in _known and _known[place][0] is ref
