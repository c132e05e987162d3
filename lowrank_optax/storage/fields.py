"""Fields of a JSON file: what each may be, and errors that name those that are not."""

from collections.abc import Callable, Mapping
import math
import re
import reprlib
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a field may be.

    Attributes:
      what: Description for messages, after "must be".
      holds: Whether a value is of this kind.
    """

    what: str
    holds: Callable[[Any], bool]

    def __or__(self, other: "Kind") -> "Kind":  # type: ignore[override]
        return Kind(f"{self.what} or {other.what}", lambda x: self.holds(x) or other.holds(x))


def _is_integer(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Whether something is a finite number; True and False are not."""
    try:
        return (_is_integer(x) or isinstance(x, float)) and math.isfinite(x)
    except OverflowError:  # an integer beyond the largest float
        return False


def is_pattern(x: Any) -> bool:
    """Whether something is text that is a regular expression."""
    try:
        return isinstance(x, str) and re.compile(x) is not None
    except re.error:
        return False


def integer(at_least: int) -> Kind:
    return Kind(f"an integer of at least {at_least}", lambda x: _is_integer(x) and x >= at_least)


def choice(*values: str) -> Kind:
    return Kind(f"one of {', '.join(map(repr, values))}", lambda x: x in values)


def list_of(kind: Kind) -> Kind:
    return Kind(
        f"a list, each of it {kind.what}",
        lambda x: isinstance(x, list | tuple) and all(map(kind.holds, x)),
    )


def mapping_to(keys: Kind, values: Kind) -> Kind:
    return Kind(
        f"an object from {keys.what} to {values.what}",
        lambda x: (
            isinstance(x, Mapping)
            and all(map(keys.holds, x))
            and all(map(values.holds, x.values()))
        ),
    )


NULL = Kind("null (None)", lambda x: x is None)
BOOLEAN = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("text", lambda x: isinstance(x, str))
PATTERN = Kind("a regular expression", is_pattern)
NUMBER = Kind("a finite number", is_number)
POSITIVE_INTEGER = Kind("a positive integer", lambda x: _is_integer(x) and x > 0)
POSITIVE_NUMBER = Kind("a positive number", lambda x: is_number(x) and x > 0)
FRACTION = Kind("a number of at least 0 and below 1", lambda x: is_number(x) and 0 <= x < 1)
OBJECT = Kind("an object", lambda x: isinstance(x, Mapping))


def wrong_fields(content: Mapping[str, Any], kinds: Mapping[str, Kind]) -> list[str]:
    """A sentence for each field of ``content`` that is not of its kind.

    Args:
      content: The fields; those without a kind, and kinds without a field, are ignored.
      kinds: Kinds by name.
    """
    return [
        f"{name} must be {kind.what}, got {_repr(content[name])}"
        for name, kind in kinds.items()
        if name in content and not kind.holds(content[name])
    ]


def _repr(value: Any) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)
