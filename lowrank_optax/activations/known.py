"""The nonlinearities that are found in a program, by what they compute."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import nn
import jax.numpy as jnp
import numpy as np

from lowrank_optax.activations.coded_backward import Pointwise, name_of
from lowrank_optax.activations.outside_traces import outside_of_traces

Functions: TypeAlias = Sequence[str | Pointwise]

# None of the kinks of the functions below but 0, where their derivatives are told apart too.
POINTS = np.concatenate([np.arange(-30, 0) * 0.29, [0.0], np.arange(1, 31) * 0.29])
POINTS = POINTS.astype(np.float32)
_LOWEST, _BELOW, _ZERO = 0, 26, 30  # at -8.7, -1.16 and 0

# A function of the values in the points: that of the family which passes through some of them.
_Family: TypeAlias = Callable[[np.ndarray], Pointwise | None]


def _fixed(fn: Pointwise) -> _Family:
    return lambda values: fn


def _leaky_relu(values: np.ndarray) -> Pointwise | None:
    slope = values[_BELOW] / POINTS[_BELOW]
    return _with(nn.leaky_relu, "negative_slope", slope, 0.01) if 0 < slope < 0.95 else None


def _leaky_relu_below(values: np.ndarray) -> Pointwise | None:
    fn = _leaky_relu(values)
    slope = getattr(fn, "keywords", {}).get("negative_slope", 0.01)
    return None if fn is None else _partial(_flat_at_zero, "negative_slope", slope)


def _flat_at_zero(x: jax.Array, negative_slope: float) -> jax.Array:
    """Leaky ReLU with its other derivative in 0."""
    return jnp.where(x > 0, x, negative_slope * x)


def _elu(values: np.ndarray) -> Pointwise | None:
    alpha = values[_LOWEST] / np.expm1(POINTS[_LOWEST])
    return _with(nn.elu, "alpha", alpha, 1.0) if 0 < alpha < np.inf else None


def _celu(values: np.ndarray) -> Pointwise | None:
    alpha = limit = -float(values[_LOWEST])
    if not 0 < alpha < -POINTS[_LOWEST]:
        return None
    for _ in range(100):
        alpha = -limit / np.expm1(POINTS[_LOWEST] / alpha)
    return _with(nn.celu, "alpha", alpha, 1.0)


def _squareplus(values: np.ndarray) -> Pointwise | None:
    b = 4 * values[_ZERO] ** 2
    return _with(nn.squareplus, "b", b, 4.0) if 0 < b < np.inf else None


def _with(fn: Callable[..., Any], option: str, found: Any, default: float) -> Pointwise:
    """The function with an option, or without if that has the default, as 16 bits tell it."""
    if abs(found - default) <= 4e-3 * default:
        return fn
    return _partial(fn, option, float(f"{float(found):.6g}"))  # 0.2 for what float32 makes of it


@functools.lru_cache(maxsize=256)
def _partial(fn: Callable[..., Any], option: str, value: Any) -> Pointwise:
    """The same object each time, by which codebooks and values are looked up."""
    return functools.partial(fn, **{option: value})


_FAMILIES: dict[str, tuple[_Family, ...]] = {
    "gelu": (_fixed(nn.gelu), _fixed(_partial(nn.gelu, "approximate", False))),
    "silu": (_fixed(nn.silu),),
    "relu": (_fixed(nn.relu),),
    "relu6": (_fixed(nn.relu6),),
    "leaky_relu": (_leaky_relu, _leaky_relu_below),
    "elu": (_elu,),
    "selu": (_fixed(nn.selu),),
    "celu": (_celu,),
    "softplus": (_fixed(nn.softplus),),
    "mish": (_fixed(nn.mish),),
    "hard_tanh": (_fixed(nn.hard_tanh),),
    "hard_sigmoid": (_fixed(nn.hard_sigmoid),),
    "hard_silu": (_fixed(nn.hard_silu),),
    "squareplus": (_squareplus,),
    "soft_sign": (_fixed(nn.soft_sign),),
    "log_sigmoid": (_fixed(nn.log_sigmoid),),
    "sigmoid": (_fixed(nn.sigmoid),),
    "tanh": (_fixed(jnp.tanh),),
}

NAMES = tuple(_FAMILIES)
"""All that can be asked for by name."""

DEFAULT_NAMES = tuple(n for n in NAMES if n not in ("log_sigmoid", "sigmoid", "tanh"))
"""Those looked for by default. The derivatives of sigmoid and tanh need their output alone, and
log_sigmoid is a part of losses."""


class Known(NamedTuple):
    """A nonlinearity that has been found.

    Attributes:
      name: As it is asked for.
      fn: The function itself.
    """

    name: str
    fn: Pointwise

    def __str__(self) -> str:
        options = getattr(self.fn, "keywords", {})
        inside = ", ".join(f"{key}={value}" for key, value in options.items())
        return f"{self.name}({inside})" if inside else self.name


def check_functions(functions: Functions) -> tuple[str | Pointwise, ...]:
    """The functions to look for.

    Raises:
      ValueError: If one is no name, or there is none.
      TypeError: If one is neither a name nor a function.
    """
    functions = (functions,) if isinstance(functions, str) else tuple(functions)
    if not functions:
        raise ValueError("functions=() must have at least one function to look for.")
    for fn in functions:
        if isinstance(fn, str) and fn not in _FAMILIES:
            raise ValueError(f"functions has {fn!r}; known by name are: {', '.join(NAMES)}.")
        if not isinstance(fn, str) and not callable(fn):
            raise TypeError(f"functions has {fn!r}, which is neither a name nor a function.")
    return functions


def candidates(functions: Functions, values: np.ndarray, tolerance: float) -> list[Known]:
    """The functions that have these values in ``POINTS``, the nearest first."""
    found = []
    for wanted in functions:
        families = _FAMILIES[wanted] if isinstance(wanted, str) else (_fixed(wanted),)
        for fn in filter(None, (family(values) for family in families)):
            error = distance(values, values_of(fn)[0])
            if error <= tolerance:
                found.append((error, Known(wanted if isinstance(wanted, str) else name_of(fn), fn)))
    return [known for _, known in sorted(found, key=lambda pair: pair[0])]


def distance(values: np.ndarray, others: np.ndarray) -> float:
    """The largest difference, relative where numbers are above 1."""
    with np.errstate(invalid="ignore"):
        error = np.max(np.abs(values - others) / np.maximum(np.abs(others), 1))
    return float(error) if np.isfinite(error) else np.inf


@functools.lru_cache(maxsize=256)
def values_of(fn: Pointwise) -> tuple[np.ndarray, np.ndarray]:
    """A function and its derivative in ``POINTS``, float32."""

    def work() -> tuple[np.ndarray, np.ndarray]:
        y, derivative = jax.jvp(fn, (jnp.asarray(POINTS),), (jnp.ones_like(POINTS),))
        return np.asarray(y), np.asarray(derivative)

    return outside_of_traces(work)
