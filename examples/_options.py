"""Options given as `--set key=value`: to whom each goes, and what is said of one nobody takes."""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
import difflib
from typing import Any

from _settings import InputError


def assign(
    settings: Iterable[str], taken: Mapping[str, Sequence[str]], kind: str
) -> Iterator[tuple[str, str, Any]]:
    """Yields (name, option, value) for each option and each of those that it goes to.

    Args:
      settings: `key=value` for all that take the option, `name.key=value` for one.
      taken: the options that each takes.
      kind: what they are, for errors.

    Raises:
      InputError: for an unknown name or option, naming the closest ones there are.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise InputError(f"--set {setting}: write it as key=value")
        for name, option in _owners(key, taken, kind):
            yield name, option, _value(text)


def _owners(key: str, taken: Mapping[str, Sequence[str]], kind: str) -> list[tuple[str, str]]:
    """Which of them an option goes to, as (name, option)."""
    name, _, option = key.rpartition(".")
    if name and name not in taken:
        hint = closest(name, taken) or f"this run has {', '.join(taken)}"
        raise InputError(f"--set {key}: no {kind} {name!r} in this run: {hint}")
    wanted = [name] if name else list(taken)
    owners = [(n, option) for n in wanted if option in taken[n]]
    if not owners:
        known = sorted(set().union(*(taken[n] for n in wanted)))
        hint = closest(option, known) or f"there are {', '.join(known)}"
        raise InputError(f"--set {key}: {' and '.join(wanted)} has no option {option!r}: {hint}")
    return owners


def closest(word: str, known: Iterable[str]) -> str:
    """A question that names the most similar words; empty if none is similar."""
    matches = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(matches)}?" if matches else ""


def _value(text: str) -> Any:
    """A Python literal where it is one (0.5, 32, None, True, (1, 2)), else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def one_line(error: Exception) -> str:
    """The first sentence of an error from elsewhere."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
