"""A derivative in a few bits: a step function of x, which says a code, and what a code stands for.

Both codings of a derivative are one of these: where an interval of x is coded, every interval has a
code of its own; where the value of the derivative is, intervals that share a value share a code.
"""

import dataclasses

import jax

from lowrank_optax.activations.coding import step_values, table_values


@dataclasses.dataclass(frozen=True)
class Codebook:
    """What stands in for a derivative ``f'``: ``levels[codes[i]]`` in the interval i of ``x``.

    Attributes:
      boundaries: Where the intervals meet, increasing, m - 1 of them. A boundary belongs to the
        interval below it.
      codes: The code of each interval, m of them; neighbours differ.
      levels: What each code stands for, at most 2**bits.
      bits: Bits of a code, 1 to 8.
      error: The integral of the squared error over the density, where it is known.
    """

    boundaries: tuple[float, ...]
    codes: tuple[int, ...]
    levels: tuple[float, ...]
    bits: int
    error: float | None = None

    def encode(self, x: jax.Array) -> jax.Array:
        """The codes of ``x``: uint8, of its shape; compared in float32 at least. NaN as -inf."""
        return step_values(self.boundaries, self.codes, x)

    def decode(self, codes: jax.Array) -> jax.Array:
        """The levels of codes: float32, of their shape."""
        return table_values(self.levels, codes)
