"""Which layers of a model are meant, and with which options."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from lowrank_optax.matrices.rules import is_weight
from lowrank_optax.matrices.selection import (
    Path,
    Where,
    check_patterns,
    matching,
    near,
    path_string,
)

T = TypeVar("T")


def modules_by_path(model: Any, is_meant: Callable[[Any], bool]) -> dict[Path, Any]:
    """The modules of an NNX model that a function is true of, by path; shared ones once."""
    from flax import nnx

    modules = nnx.iter_modules(model)
    return {tuple(map(str, path)): module for path, module in modules if is_meant(module)}


def select(
    modules: Mapping[Path, Any],
    where: Where,
    kind: str,
    *,
    default: Iterable[Path] | None = None,
) -> dict[Path, Any]:
    """The modules that ``where`` means, in their order.

    Args:
      modules: All modules in question, by path.
      where: Which of them.
      kind: What they are, for messages: ``"linear layer"``.
      default: Those meant by ``where=None``, of which output heads are left out; None for all.

    Raises:
      ValueError: If ``where`` matches no module (the message lists similar paths), or a pattern is
        not a regular expression.
      TypeError: If ``where`` is not what a `Where` may be.
    """
    if where is not None:
        return {path: modules[path] for path in matching("where", modules, where, kind)}
    paths = modules if default is None else default
    found = {path: modules[path] for path in paths if is_weight(f"{path_string(path)}/kernel")}
    if not found:
        known = near(modules, "")
        raise ValueError(f"where=None finds no {kind} except heads and embeddings; {known}")
    return found


def options_by_path(
    argument: str, paths: Iterable[Path], options: Mapping[str, T], kind: str
) -> dict[Path, T]:
    """The options that are given by regular expressions: the first that is found in a path counts.

    Args:
      argument: Name of the argument, for messages.
      paths: Paths of the modules (or leaves) in question.
      options: From regular expressions to options.
      kind: What has the paths, for messages.

    Raises:
      ValueError: If a pattern is found in no path, or is no regular expression.
    """
    paths = list(paths)
    patterns = check_patterns(argument, options, paths, kind)
    found: dict[Path, T] = {}
    for path in paths:
        for pattern, option in zip(patterns, options.values(), strict=True):
            if pattern.search(path_string(path)):
                found[path] = option
                break
    return found
