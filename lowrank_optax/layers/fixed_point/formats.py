"""Fixed-point formats: which integers there are, and how a number becomes one of them."""

import dataclasses
import functools
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

Rounding: TypeAlias = Literal[
    "TRN", "TRN_ZERO", "RND", "RND_CONV", "RND_ZERO", "RND_INF", "RND_MIN_INF"
]
"""Rounding of ``ap_fixed``: down or toward zero; or to the nearest, where ties go up, to the even
integer, toward zero, away from it, or down."""

Overflow: TypeAlias = Literal["WRAP", "SAT", "SAT_SYM", "SAT_ZERO", "WRAP_SM"]
"""What happens outside the range, as in ``ap_fixed``: two's complement, the nearest end, the same
with symmetric ends, zero, or sign and magnitude."""

MOST_BITS, MOST_BITS_OF_ONES = 53, 16


@dataclasses.dataclass(frozen=True)
class FixedPointFormat:
    """Format of a fixed-point number, ``ap_fixed<W, I, Q, O>`` without the binary point ``I``.

    A number is an integer times the step ``2**(I - bits)``.

    Args:
      bits: Word length ``W``, with the sign bit: 1 to 53, and 24 at most in float32.
      signed: Whether there is a sign bit. Without one, and with ``overflow="SAT"``, quantization
        includes a ReLU.
      rounding: Quantization mode ``Q``.
      overflow: Overflow mode ``O``.
      ones: Largest number ``K`` of ones in the binary integer without its sign, so that a product
        is ``K`` shifts and additions; None for all integers. Numbers go to the nearest of those
        that are left, so this needs ``"RND"`` and ``"SAT"``, and 16 bits at most.
      signed_digits: Whether ``ones`` counts the non-zero digits of the signed-digit form, ±1.

    Raises:
      TypeError: If ``bits`` or ``ones`` is not an int, or ``signed`` or ``signed_digits`` no bool.
      ValueError: If a number is out of range, a mode unknown, or two of them do not go together.

    Example:
      >>> import lowrank_optax as lro
      >>> number = lro.layers.FixedPointFormat(4)
      >>> number.smallest, number.largest
      (-8, 7)
      >>> lro.layers.FixedPointFormat(4, ones=1).integers().tolist()
      [-8, -4, -2, -1, 0, 1, 2, 4]
    """

    bits: int
    signed: bool = True
    rounding: Rounding = "RND"
    overflow: Overflow = "SAT"
    ones: int | None = None
    signed_digits: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        _check_int("bits", self.bits, 1, MOST_BITS)
        for name in ("signed", "signed_digits"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False.")
        for name, modes in (("rounding", Rounding), ("overflow", Overflow)):
            if getattr(self, name) not in get_args(modes):
                known = ", ".join(map(repr, get_args(modes)))
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {known}.")
        if self.overflow == "WRAP_SM" and not self.signed:
            raise ValueError("overflow='WRAP_SM' needs a sign bit: set signed=True.")
        if self.ones is None and self.signed_digits:
            raise ValueError("signed_digits=True needs ones, the number of digits.")
        if self.ones is not None:
            _check_int("ones", self.ones, 1, MOST_BITS)
            _check_int("bits", self.bits, 1, MOST_BITS_OF_ONES, " if ones is given")
            if (self.rounding, self.overflow) != ("RND", "SAT"):
                raise ValueError(
                    f"ones={self.ones} takes the nearest number: it needs rounding='RND' and "
                    f"overflow='SAT', not {self.rounding!r} and {self.overflow!r}."
                )

    @property
    def smallest(self) -> int:
        """The smallest integer."""
        if self.ones is not None:
            return int(self.integers()[0])
        if not self.signed:
            return 0
        return -self.largest if self.overflow == "SAT_SYM" else -(2 ** (self.bits - 1))

    @property
    def largest(self) -> int:
        """The largest integer."""
        if self.ones is not None:
            return int(self.integers()[-1])
        return 2 ** (self.bits - self.signed) - 1

    def integers(self) -> np.ndarray:
        """All integers of a format with ``ones``, ascending, int64."""
        if self.ones is None:
            raise ValueError("integers() is for formats with ones: others have all of a range.")
        return _with_few_ones(self.bits, self.signed, self.ones, self.signed_digits)


@functools.cache
def _with_few_ones(bits: int, signed: bool, ones: int, signed_digits: bool) -> np.ndarray:
    low = -(2 ** (bits - 1)) if signed else 0
    integers = np.arange(low, low + 2**bits)
    # The signed-digit form of n with the fewest digits has one wherever n and 3n differ.
    words = np.abs(integers)
    words = words ^ 3 * words if signed_digits else words
    count = sum(words >> place & 1 for place in range(bits + 2))
    found = integers[count <= ones]
    found.flags.writeable = False
    return found


def _check_int(name: str, value: Any, least: int, most: int, when: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an int.")
    if not least <= value <= most:
        raise ValueError(f"{name}={value} must be {least} to {most}{when}.")
