"""Fixed-point layers in integers alone: NumPy arrays of int64, and not one floating-point number.

This is the reference that hardware has to agree with, and that the JAX layers agree with.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from lowrank_optax.layers.fixed_point.formats import FixedPointFormat

MOST_BITS = 60


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerArray:
    """Fixed-point numbers: integers, each times ``2**-fraction_bits``.

    ``numpy.ldexp(x.integers, -x.fraction_bits)`` are the numbers.

    Args:
      integers: Integers of any shape; converted to int64.
      fraction_bits: Number of bits right of the binary point, an int or one for each index of the
        last axis.

    Raises:
      TypeError: If one of them is not an integer.
      ValueError: If an integer has more than 60 bits, or ``fraction_bits`` another shape.

    Example:
      >>> import lowrank_optax as lro, numpy as np
      >>> x = lro.layers.IntegerArray(np.array([-3, 5]), 1)
      >>> print(np.ldexp(x.integers, -x.fraction_bits), x.clip(0).integers)
      [-1.5  2.5] [0 5]
    """

    integers: np.ndarray
    fraction_bits: Any

    def __post_init__(self) -> None:
        """Check that there is no floating-point number, and no integer of too many bits."""
        for name in ("integers", "fraction_bits"):
            value = np.asarray(getattr(self, name))
            if value.dtype.kind not in "iu":
                raise TypeError(f"{name} must be integers, not {value.dtype}.")
            _check_bits(value)
            object.__setattr__(self, name, value.astype(np.int64))
        if self.fraction_bits.shape not in ((), self.shape[-1:]):
            raise ValueError(
                f"fraction_bits {self.fraction_bits.shape} must be one int, or one for each index "
                f"of the last axis of integers {self.shape}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers."""
        return self.integers.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.integers.ndim

    def __len__(self) -> int:
        return len(self.integers)

    def reshape(self, *shape: Any) -> "IntegerArray":
        """The same numbers in another shape."""
        aligned = _aligned(self)
        return IntegerArray(aligned.integers.reshape(*shape), aligned.fraction_bits)

    def clip(self, min: int) -> "IntegerArray":
        """The numbers, or 0 where they are below it: a ReLU; no other bound is taken."""
        if min != 0:
            raise ValueError(f"min={min} must be 0.")
        return IntegerArray(np.maximum(self.integers, 0), self.fraction_bits)


def _check_bits(integers: np.ndarray, shift: int = 0) -> None:
    if integers.size == 0:
        return
    largest = max(int(integers.max()), -int(integers.min()))
    if largest and largest.bit_length() + shift > MOST_BITS:
        raise ValueError(
            f"a sum needs {largest.bit_length() + shift} bits, and {MOST_BITS} are computed with: "
            "quantize inputs and outputs in formats that are closer to each other."
        )


def _shifted(integers: np.ndarray, left: Any) -> np.ndarray:
    """The integers times ``2**left``, exactly; ``left`` is at least 0."""
    _check_bits(integers, int(np.max(left, initial=0)))
    return np.left_shift(integers, left)


def _aligned(x: IntegerArray, fraction_bits: Any = None) -> IntegerArray:
    """The same numbers with one binary point for all, or with given ones that are not fewer."""
    bits = np.max(x.fraction_bits) if fraction_bits is None else fraction_bits
    return IntegerArray(_shifted(x.integers, bits - x.fraction_bits), bits)


def add(x: IntegerArray, y: IntegerArray) -> IntegerArray:
    """The exact sum."""
    bits = np.maximum(x.fraction_bits, y.fraction_bits)
    return IntegerArray(_aligned(x, bits).integers + _aligned(y, bits).integers, bits)


class Cast(NamedTuple):
    """Assignment to a format with a binary point: rounding, then overflow.

    Attributes:
      format: Word length and modes.
      integer_bits: Position of the binary point, an int or one for each index of the last axis.
    """

    format: FixedPointFormat
    integer_bits: Any

    @property
    def fraction_bits(self) -> Any:
        """Number of bits right of the binary point."""
        return self.format.bits - np.asarray(self.integer_bits)

    def __call__(self, x: IntegerArray) -> IntegerArray:
        """The nearest numbers of the format, or as its modes say."""
        right = x.fraction_bits - self.fraction_bits
        n = _shifted(x.integers, np.maximum(-right, 0))
        # Of 60 bits none is left after 62, not even for rounding.
        right = np.minimum(np.maximum(right, 0), MOST_BITS + 2)
        if self.format.ones is not None:
            return IntegerArray(_nearest(n, right, self.format), self.fraction_bits)
        rounded = _rounded(n, right, self.format.rounding)
        return IntegerArray(_overflow(rounded, self.format), self.fraction_bits)


def _rounded(n: np.ndarray, right: Any, rounding: str) -> np.ndarray:
    down = np.right_shift(n, right)
    rest = n - np.left_shift(down, right)
    if rounding == "TRN":
        return down
    if rounding == "TRN_ZERO":
        return down + ((n < 0) & (rest > 0))
    half = np.left_shift(1, right) - rest  # what is missing to the integer above
    ties_up = {
        "RND": True,
        "RND_CONV": down % 2 == 1,
        "RND_ZERO": n < 0,
        "RND_INF": n > 0,
        "RND_MIN_INF": False,
    }[rounding]
    return down + ((rest > half) | ((rest == half) & ties_up))


def _overflow(n: np.ndarray, format: FixedPointFormat) -> np.ndarray:
    low, high, size = format.smallest, format.largest, 2**format.bits
    if format.overflow in ("SAT", "SAT_SYM"):
        return np.clip(n, low, high)
    if format.overflow == "SAT_ZERO":
        return np.where((n < low) | (n > high), 0, n)
    turns, wrapped = n // size, n % size
    if not format.signed:
        return wrapped
    wrapped = np.where(wrapped > high, wrapped - size, wrapped)
    if format.overflow == "WRAP_SM":
        return np.where((turns % 2 == 1) != (wrapped < 0), ~wrapped, wrapped)
    return wrapped


def _nearest(n: np.ndarray, right: Any, format: FixedPointFormat) -> np.ndarray:
    """The nearest integers with few ones of ``n * 2**-right``, ties up."""
    levels = format.integers()
    # The halves of the middles as integers: x >= m/2 is floor(2 x) >= m, for integers m.
    middles = levels[1:] + levels[:-1]
    doubled = np.where(right > 0, np.right_shift(n, np.maximum(right, 1) - 1), n)
    # Not 2 n where nothing is shifted: it could overflow, and beyond the ends it changes nothing.
    doubled = np.where(right > 0, doubled, 2 * np.clip(n, levels[0] - 1, levels[-1] + 1))
    return levels[np.searchsorted(middles, doubled, side="right")]


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerLayer:
    """One layer in integers; call it with `IntegerArray` inputs.

    Attributes:
      kind: ``"linear"``, ``"convolution"``, ``"norm"``, ``"sum"`` or ``"quantizer"``.
      weight: Integers of the weight, or of a norm's scale; None for the last two kinds.
      bias: Integers of the bias, or of a norm's shift, or None.
      input: Assignment of the input, or None.
      output: Assignment of the output, or None.
      options: Strides, padding, dilation and groups of a convolution.
    """

    kind: str
    weight: IntegerArray | None = None
    bias: IntegerArray | None = None
    input: Cast | None = None
    output: Cast | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, x: IntegerArray, y: IntegerArray | None = None) -> IntegerArray:
        """Compute the layer's outputs; a sum takes two inputs."""
        total = self.accumulate(x, y)
        return total if self.output is None else self.output(total)

    def accumulate(self, x: IntegerArray, y: IntegerArray | None = None) -> IntegerArray:
        """The exact sums, before they are assigned to the output."""
        if (self.kind == "sum") != (y is not None):
            raise TypeError(f"a {self.kind} takes {2 if self.kind == 'sum' else 1} inputs.")
        if y is not None:
            return add(x, y)
        x = x if self.input is None else self.input(x)
        if self.weight is None:
            return x
        if self.kind != "norm":
            x = _aligned(x)
        product = {"linear": _linear, "convolution": _convolution, "norm": _scale}[self.kind]
        bits = x.fraction_bits + self.weight.fraction_bits
        _check_product(x.integers, self.weight.integers)
        total = IntegerArray(product(x.integers, self.weight.integers, **self.options), bits)
        return total if self.bias is None else add(total, self.bias)


def _check_product(x: np.ndarray, weight: np.ndarray) -> None:
    if x.size == 0 or weight.size == 0:
        return
    terms = weight.size // weight.shape[-1]
    bound = max(int(x.max()), -int(x.min())) * max(int(weight.max()), -int(weight.min())) * terms
    if bound.bit_length() > MOST_BITS:
        raise ValueError(
            f"a sum of products may need {bound.bit_length()} bits, and {MOST_BITS} are computed "
            "with: quantize the input in fewer bits."
        )


def _linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x @ weight


def _scale(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x * weight


def _convolution(
    x: np.ndarray,
    weight: np.ndarray,
    strides: tuple[int, ...],
    padding: str | tuple[tuple[int, int], ...],
    kernel_dilation: tuple[int, ...],
    groups: int,
) -> np.ndarray:
    """Convolution of ``[..., *spatial, in]`` with a kernel ``[*window, in / groups, out]``."""
    window, rank = weight.shape[:-2], weight.ndim - 2
    lead, spatial, channels = x.shape[: -rank - 1], x.shape[-rank - 1 : -1], x.shape[-1]
    x = x.reshape(-1, *spatial, channels)
    reach = [(k - 1) * d + 1 for k, d in zip(window, kernel_dilation, strict=True)]
    if padding == "SAME":
        needed = [
            max((-(-n // s) - 1) * s + r - n, 0)
            for n, s, r in zip(spatial, strides, reach, strict=True)
        ]
        pads = [(n // 2, n - n // 2) for n in needed]
    else:
        pads = [(0, 0)] * rank if isinstance(padding, str) else [(a, b) for a, b in padding]
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    sizes = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)]
    total = np.zeros((len(x), *sizes, weight.shape[-1]), np.int64)
    inputs, outputs = weight.shape[-2], weight.shape[-1] // groups
    for offset in np.ndindex(*window):
        starts = [o * d for o, d in zip(offset, kernel_dilation, strict=True)]
        slices = [
            slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, sizes, strides, strict=True)
        ]
        part = x[(slice(None), *slices)]
        for group in range(groups):
            rows = slice(group * inputs, (group + 1) * inputs)
            columns = slice(group * outputs, (group + 1) * outputs)
            total[..., columns] += part[..., rows] @ weight[offset][:, columns]
    return total.reshape(*lead, *total.shape[1:])


class IntegerLayers(Mapping[str, IntegerLayer]):
    """Layers by their path; ``layers["blocks/0/up"]`` is ``layers.blocks[0].up`` too.

    A model's own ``__call__`` takes them as its ``self`` if it uses layers, ``reshape`` and
    ``clip(0)`` alone: ``Network.__call__(layers, x)``.
    """

    def __init__(self, layers: Mapping[str, IntegerLayer]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, path: str | int) -> Any:
        found = self._layers.get(str(path))
        if found is not None:
            return found
        start = f"{path}/"
        inside = {k.removeprefix(start): x for k, x in self._layers.items() if k.startswith(start)}
        if not inside:
            raise KeyError(path)
        return IntegerLayers(inside)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no layer {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
