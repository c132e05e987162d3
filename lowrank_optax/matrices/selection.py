"""Which things of a model are meant by a pattern, a filter or a function: layers, arrays."""

from collections.abc import Iterable, Mapping
import difflib
import re
from typing import Any, TypeAlias

from lowrank_optax.matrices.paths import compiled_pattern

Where: TypeAlias = Any
"""Layers by a regular expression found in their path (``blocks/attention/query``), a list of such
expressions, a class of modules or any other filter of ``flax.nnx`` or function of path and module,
or (None) a default that is documented where it is taken."""

Path: TypeAlias = tuple[str, ...]


def matching(argument: str, things: Mapping[Path, Any], where: Where, kind: str) -> list[Path]:
    """The paths of what a pattern, a list of patterns, a filter or a function means.

    Raises:
      ValueError: If it is nothing, or a pattern of a list matches nothing, with the nearest paths;
        or a pattern is no regular expression.
      TypeError: If ``where`` is none of those.
    """
    several = isinstance(where, list | tuple) and where and all(isinstance(w, str) for w in where)
    if isinstance(where, str) or several:
        patterns = [where] if isinstance(where, str) else where
        compiled = check_patterns(argument, patterns, things, kind)
        return [path for path in things if any(p.search(path_string(path)) for p in compiled)]
    means = _predicate(argument, where)
    found = [path for path, x in things.items() if means(path, x)]
    if not found:
        raise ValueError(f"{argument}={where!r} matches no {kind}; {near(things, '')}")
    return found


def check_patterns(
    argument: str, patterns: Iterable[str], things: Iterable[Path], kind: str
) -> list[re.Pattern[str]]:
    """Patterns, compiled, each of which is found in a path at least.

    Raises:
      ValueError: If one is found in no path, with the nearest ones, or is no regular expression.
    """
    compiled = [compiled_pattern(argument, pattern) for pattern in patterns]
    names = [path_string(path) for path in things]
    for each in compiled:
        if not any(map(each.search, names)):
            raise ValueError(
                f"{argument}={each.pattern!r} matches no {kind}; {near(things, each.pattern)}"
            )
    return compiled


def path_string(path: Iterable[str]) -> str:
    """``blocks/attention/query``."""
    return "/".join(path)


def _predicate(argument: str, where: Where) -> Any:
    from flax import nnx

    try:
        return nnx.filterlib.to_predicate(where)
    except (TypeError, ValueError):
        raise TypeError(
            f"{argument}={where!r} must be a regular expression, a list of them, a class, a filter "
            "of flax.nnx, or a function of path and object."
        ) from None


def near(things: Iterable[Path], pattern: str) -> str:
    """The end of an error: which paths or names are near what was asked for."""
    known = [path_string(path) for path in things]
    if not known:
        return "there is none."
    names = sorted({*known, *(name for path in things for name in path)})
    plain = re.sub(r"[^\w/]+", "", pattern)
    nearest = difflib.get_close_matches(plain, names, n=5, cutoff=0.4) or known[:5]
    return f"near it are: {', '.join(nearest)}."
