"""Ranks: one number, a fraction of each matrix, a rule by path, or a function of the shape."""

from collections.abc import Callable, Mapping
import math
import operator
import re
from typing import Any, TypeAlias

import jax

from lowrank_optax.matrices.paths import compiled_pattern

RankSpec: TypeAlias = (
    int | float | Callable[[str, tuple[int, ...]], int | float] | Mapping[str, int | float]
)


def check_rank(rank: RankSpec) -> RankSpec:
    """The rank as it was given; an error that names the usual mistakes otherwise.

    Raises:
      TypeError: If it is an array, or none of the kinds allowed.
      ValueError: If a number is below 1, or a fraction not in (0, 1).
    """
    if isinstance(rank, Mapping):
        for pattern, value in rank.items():
            compiled_pattern("rank", pattern)
            _check_number(value, f"rank[{pattern!r}]")
    elif not callable(rank):
        _check_number(rank, "rank")
    return rank


def resolve_rank(rank: RankSpec, path: str, shape: tuple[int, ...]) -> int:
    """The rank of one matrix ``[*batch, m, n]``: an int from 1 to ``min(m, n)``.

    Args:
      rank: An int; a fraction of the smaller side (0 < fraction < 1, rounded up); a function of
        ``(path, shape)`` that returns one of these; or a mapping from patterns to them, of which
        the first whose pattern is found in the path (``re.search``) holds.
      path: The leaf's path, as ``blocks/mlp/up/kernel``.
      shape: The matrix's shape.

    Raises:
      ValueError: If no pattern is found in the path, or a number is out of range.
      TypeError: If it is none of these.

    Example:
      >>> resolve_rank({"attention": 4, ".*": 0.25}, "blocks/mlp/up/kernel", (64, 256))
      16
    """
    if isinstance(rank, Mapping):
        found = next((v for pattern, v in rank.items() if re.search(pattern, path)), None)
        if found is None:
            raise ValueError(
                f"rank={dict(rank)!r} has no pattern for {path!r}; end it with {{'.*': rank}}."
            )
        value = found
    else:
        value = rank(path, shape) if callable(rank) else rank
    value = _check_number(value, f"rank of {path!r}" if path else "rank")
    smaller = min(shape[-2:])
    if isinstance(value, float):
        # Less a hair: 0.07 · 100 is 7.000000000000001, which is 7.
        value = max(1, math.ceil(value * smaller - 1e-6))
    return min(value, smaller)


def _check_number(value: Any, name: str) -> int | float:
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name}={value} is an array, but it fixes shapes and must be a Python number; under "
            "optax.inject_hyperparams, list it in static_args."
        )
    if isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a number.")
    if isinstance(value, float):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value!r} must be an int, or a fraction between 0 and 1.")
        return value
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name}={value!r} must be an int, a fraction, a mapping from patterns to these, or a "
            "function of path and shape."
        ) from None
    if number < 1:
        raise ValueError(f"{name}={value!r} must be at least 1.")
    return number
