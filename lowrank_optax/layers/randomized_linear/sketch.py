"""What is kept of a linear layer's input: of which kind, and how large."""

import dataclasses
from typing import Literal, TypeAlias

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

    Attributes:
      kind: How the p rows are made; see `randomized_linear`.
      fraction: p / B, rounded down; above 0 and at most 1.
      size: p itself, in the place of ``fraction``.
      min_size: The least p.
      max_size: The largest p.
    """

    kind: SketchKind = "stratified"
    fraction: float | None = None
    size: int | None = None
    min_size: int = 1
    max_size: int | None = None

    def rows(self, count: int) -> int:
        """How many rows a sketch of ``count`` rows has, at most ``count``."""
        size = self.size if self.size is not None else int((self.fraction or 0.0) * count)
        size = max(size, self.min_size)
        return min(size, count, count if self.max_size is None else self.max_size)
