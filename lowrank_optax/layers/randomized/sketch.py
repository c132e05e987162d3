"""What is kept of a linear layer's input: of which kind, and how large."""

import dataclasses
import math
import numbers
from typing import Any, Literal, TypeAlias, get_args

SketchKind: TypeAlias = Literal[
    "rows",
    "stratified",
    "norm_weighted",
    "winner_take_all",
    "gaussian",
    "rademacher",
    "srht",
    "dct",
]


@dataclasses.dataclass(frozen=True)
class Sketch:
    """Kind and size of a sketch of B rows: p rows, a fraction of them or an absolute number.

    Frozen and hashable: a static argument of a jitted function, or a field of a module.

    Attributes:
      kind: How the p rows are made: ``"stratified"`` and ``"rows"``, drawn uniformly;
        ``"norm_weighted"`` and ``"winner_take_all"``, by their norms; ``"gaussian"``,
        ``"rademacher"``, ``"srht"`` and ``"dct"``, sums over all rows. See `randomized_linear`.
      fraction: p / B, rounded down; above 0 and at most 1.
      size: p itself, in the place of ``fraction``.
      min_size: The least p, where a fraction of few rows would be too few.
      max_size: The largest p.

    Raises:
      ValueError: If not exactly one of ``fraction`` and ``size`` is given, the kind is none of
        those, or a number is out of its range.

    Example:
      >>> import lowrank_optax as lro
      >>> sketch = lro.layers.Sketch(fraction=0.1, min_size=8)
      >>> sketch.rows(4096), sketch.rows(32), sketch.rows(4)
      (409, 8, 4)
    """

    kind: SketchKind = "stratified"
    fraction: float | None = None
    size: int | None = None
    min_size: int = 1
    max_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(SketchKind):
            kinds = ", ".join(map(repr, get_args(SketchKind)))
            raise ValueError(f"kind={self.kind!r} must be one of {kinds}.")
        if (self.fraction is None) == (self.size is None):
            given = f"fraction={self.fraction!r} and size={self.size!r}"
            raise ValueError(f"Give one of fraction and size, not {given}.")
        if self.fraction is not None and not (_is_real(self.fraction) and 0 < self.fraction <= 1):
            raise ValueError(f"fraction={self.fraction!r} must be above 0 and at most 1.")
        for name in ("size", "min_size", "max_size"):
            value = getattr(self, name)
            if value is not None and not _is_positive_integer(value):
                raise ValueError(f"{name}={value!r} must be an integer, 1 at least.")
        if self.max_size is not None and self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} must be min_size={self.min_size} at least.")

    def rows(self, count: int) -> int:
        """How many rows a sketch of ``count`` rows has, at most ``count``."""
        if self.fraction is None:
            size = self.size or 0
        else:  # 0.29 * 100 is 28.999...
            size = math.floor(self.fraction * count + 1e-9)
        size = max(size, self.min_size)
        return min(size, count, count if self.max_size is None else self.max_size)


def _is_real(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _is_positive_integer(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool) and int(x) >= 1
