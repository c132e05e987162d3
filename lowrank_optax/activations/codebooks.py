"""Step functions that stand in for a derivative: the best for any function, and shipped ones."""

from collections.abc import Callable
import dataclasses
import functools
import gzip
from importlib import resources
import inspect
import json
import numbers
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.quantization.maps import count_steps, select_levels

Coding: TypeAlias = Literal["value", "interval"]
DensityName: TypeAlias = Literal["uniform", "normal"]

FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "celu": jax.nn.celu,
    "elu": jax.nn.elu,
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_silu": jax.nn.hard_silu,
    "hard_tanh": jax.nn.hard_tanh,
    "leaky_relu": jax.nn.leaky_relu,
    "log_sigmoid": jax.nn.log_sigmoid,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "soft_sign": jax.nn.soft_sign,
    "softplus": jax.nn.softplus,
    "squareplus": jax.nn.squareplus,
    "tanh": jnp.tanh,
}
"""The functions with shipped codebooks, with JAX's defaults of their other arguments."""

DOMAIN = 10.0
TABLES = "tables.json.gz"


@dataclasses.dataclass(frozen=True)
class Codebook:
    """What stands in for a derivative ``f'``: ``levels[codes[i]]`` in the interval i of ``x``.

    Where an interval of x is coded, every interval has a code of its own; where the value of the
    derivative is, intervals that share a level share a code.

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


def codebook(
    fn: Callable[[jax.Array], jax.Array],
    bits: int = 3,
    *,
    density: DensityName | Any = "uniform",
    domain: float = 10.0,
    coding: Coding = "value",
) -> Codebook:
    r"""The step function of at most ``2**bits`` levels that is nearest to the derivative of ``fn``.

    It has the least

    .. math::
      L = \int_{-A}^{A} (f'(x) - q(x))^2 \, w(x) \, dx

    of all :math:`q` with that many levels (``coding="value"``), or with that many intervals
    (``coding="interval"``): the best on a grid of 2048 points by dynamic programming, and from
    there Lloyd's algorithm to where every level is the mean of :math:`f'` over what it stands for,
    and :math:`f'` at every boundary the mean of the two levels that meet. Piecewise linear
    functions need no more levels than they have slopes, and come out exactly, at their kinks as
    ``jax.grad`` has it in float32.

    It may be called while tracing; the result holds plain numbers. Fits take about a second. Those
    of jax.nn's functions are read from a file, others are remembered, but for those with measured
    densities.

    Args:
      fn: Elementwise function of a float, differentiable by ``jax.grad`` in float64; its derivative
        may jump.
      bits: Bits of a code, 1 to 8.
      density: Weight of the error, :math:`w`: ``"uniform"``, 1 everywhere; ``"normal"``, of mean 0
        and deviation 1; or measured inputs of ``fn``, an array of any shape: their histogram, of
        integral 1. Inputs off the domain are left out of it.
      domain: :math:`A`. What lies off it, on whichever side, gets the outermost code of that side.
      coding: What a code says. ``"value"``: which level is nearest to the derivative; intervals of
        x with one level share a code. It is never worse. ``"interval"``, as in the paper: in which
        interval of x it lies, or of \|x\| where the derivative is even, as that of ``tanh``.

    Returns:
      The codebook; its ``error`` is :math:`L`.

    Raises:
      ValueError: If ``bits``, ``density``, ``domain`` or ``coding`` is not one of its choices, or
        the derivative is not finite somewhere on the domain.
      TypeError: If ``fn`` does not take a float to a float.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> book = lro.activations.codebook(jax.nn.gelu, bits=2)
      >>> print([round(level, 4) for level in book.levels])
      [-0.0157, 0.3195, 0.6805, 1.0157]
      >>> print([round(boundary, 4) for boundary in book.boundaries], f"{book.error:.4f}")
      [-0.4692, 0.0, 0.4692] 0.0407
      >>> print(lro.activations.codebook(jax.nn.relu6, bits=3).levels)  # no more than needed
      (0.0, 1.0)

    Reference:
      Novikov et al., Few-bit Backward: Quantized Gradients of Activation Functions for Memory
      Footprint Reduction, 2022, https://arxiv.org/abs/2202.00441, Section 3; coding the value is
      ours.
    """
    # Here, as that module imports this one.
    from lowrank_optax.activations.fitting import fit, fit_once

    _check(bits, domain, coding)
    if not isinstance(density, str):
        return fit(fn, int(bits), density, float(domain), coding)
    name = known_name(fn)
    if name is not None and domain == DOMAIN and density in get_args(DensityName):
        return _shipped(name, bits, density, coding)
    try:
        hash(fn)
    except TypeError:
        return fit(fn, int(bits), density, float(domain), coding)
    return fit_once(fn, int(bits), density, float(domain), coding)


def table(
    name: str, bits: int = 3, density: DensityName = "uniform", coding: Coding = "value"
) -> Codebook:
    """The shipped codebook of a known function; see `codebook`.

    Args:
      name: A key of `FUNCTIONS`.
      bits: 1 to 8.
      density: ``"uniform"`` or ``"normal"``.
      coding: ``"value"`` or ``"interval"``.

    Raises:
      ValueError: If an argument is not one of its choices.
    """
    if name not in FUNCTIONS:
        raise ValueError(f"name={name!r} must be one of {', '.join(FUNCTIONS)}.")
    if density not in get_args(DensityName):
        raise ValueError(f"density={density!r} must be 'uniform' or 'normal'.")
    _check(bits, DOMAIN, coding)
    return _shipped(name, bits, density, coding)


def _shipped(name: str, bits: int, density: str, coding: str) -> Codebook:
    boundaries, codes, levels, error = _rows()[name][density][coding][bits - 1]
    return Codebook(tuple(boundaries), tuple(codes), tuple(levels), int(bits), error)


@functools.cache
def _rows() -> dict[str, Any]:
    """From a function, a density and a coding to a list of codebooks by ``bits - 1``."""
    file = resources.files("lowrank_optax.activations") / TABLES
    return json.loads(gzip.decompress(file.read_bytes()))


def _check(bits: Any, domain: Any, coding: Any) -> None:
    whole = isinstance(bits, numbers.Integral) and not isinstance(bits, bool)
    if not whole or not 1 <= int(bits) <= 8:
        raise ValueError(f"bits={bits!r} must be an int from 1 to 8.")
    if not isinstance(domain, numbers.Real) or not 0 < float(domain) < np.inf:
        raise ValueError(f"domain={domain!r} must be a positive number: half the width fitted on.")
    if coding not in get_args(Coding):
        raise ValueError(f"coding={coding!r} must be 'value' or 'interval'.")


def known_name(fn: Any) -> str | None:
    """The name in `FUNCTIONS` of what computes the same, or None."""
    keywords: dict[str, Any] = {}
    if isinstance(fn, functools.partial) and not fn.args:
        fn, keywords = fn.func, fn.keywords
    if getattr(fn, "__module__", None) == "lowrank_optax.activations.functions":
        fn = getattr(jax.nn, fn.__name__, fn)
    if fn is jax.nn.gelu and keywords == {"approximate": False}:
        return "gelu_erf"
    if keywords:
        own = inspect.signature(fn).parameters
        numbers_equal = lambda a, b: isinstance(a, bool | int | float) and a == b
        if not all(n in own and numbers_equal(v, own[n].default) for n, v in keywords.items()):
            return None
    names: dict[Any, str] = {jax.lax.logistic: "sigmoid", jax.lax.tanh: "tanh"}
    names |= {known: name for name, known in FUNCTIONS.items()}
    try:
        return names.get(fn)
    except TypeError:  # no hash
        return None


MOST_COMPARES = 48  # boundaries; at 5 bits codebooks have about 40
MOST_SELECTS = 32  # levels
MOST_BINS = 4096


def step_values(boundaries: tuple[float, ...], codes: tuple[int, ...], x: jax.Array) -> jax.Array:
    """uint8: ``codes[i]`` where i boundaries are below ``x``; ``codes[0]`` where that is NaN.

    A sum of comparisons fuses with what makes ``x``, and a TPU is slow in gathers. Many boundaries
    are looked up by bins, at a cost that hardly grows.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if len(boundaries) <= MOST_COMPARES:
        return count_steps(boundaries, codes, x).astype(jnp.uint8)
    low, per_unit, first, edges, growths = _bins(boundaries, codes, x.dtype.name)
    index = jnp.minimum((x - low) * per_unit, len(first) - 1)
    index = jnp.where(x > low, index, 0).astype(jnp.int32)
    code = _gathered(first, index)
    for edge, growth in zip(edges, growths, strict=True):
        code += jnp.where(x > _gathered(edge, index), _gathered(growth, index), jnp.uint8(0))
    return code


def table_values(levels: tuple[float, ...], codes: jax.Array) -> jax.Array:
    """float32: ``levels[codes]``."""
    codes = codes.astype(jnp.int32)
    if len(levels) <= MOST_SELECTS:
        return select_levels(levels, codes)
    return _gathered(np.asarray(levels, np.float32), codes)


def _gathered(table: np.ndarray, index: jax.Array) -> jax.Array:
    """``table[index]``, sharded as ``index`` is."""
    sharding = explicit_sharding.partition_of(index)
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds", out_sharding=sharding)


@functools.lru_cache(maxsize=256)
def _bins(boundaries: tuple[float, ...], codes: tuple[int, ...], dtype: str) -> tuple:
    """Equal parts of the boundaries' range, with one boundary in each if `MOST_BINS` suffice.

    The lowest boundary and the bins per unit; for each bin its first code, and rows of its
    boundaries and of what the code grows by at each (modulo 256).
    """
    edges = np.asarray(boundaries, dtype)
    code = np.asarray(codes, np.uint8)
    low, width = edges[0], edges[-1] - edges[0]
    gap = max(np.diff(edges).min(), width / MOST_BINS)
    count = min(2 ** int(np.ceil(np.log2(width / gap))), MOST_BINS)
    # In the arithmetic of `step_values`, which never puts a larger number into an earlier bin.
    per_unit = edges.dtype.type(count / width)
    index = np.minimum((edges - low) * per_unit, count - 1).astype(np.int32)
    before = np.searchsorted(index, np.arange(count))
    rank = np.arange(len(edges)) - before[index]
    shape = (rank.max() + 1, count)
    tables = np.full(shape, np.inf, edges.dtype), np.zeros(shape, np.uint8)
    tables[0][rank, index] = edges
    tables[1][rank, index] = code[1:] - code[:-1]
    return low, per_unit, code[before], *tables
