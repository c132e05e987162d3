"""Known nonlinearities in a program, found by the calls it makes.

The program is a jaxpr. There, ``jax.nn.silu`` is a call with a name, as most functions of
``jax.nn`` are; ``jax.nn.gelu`` is not, so its own equations are looked for. What is found computes
the same values and the same derivative as the known function in `POINTS`: that is checked.
"""

from collections.abc import Sequence
import dataclasses
import functools
import inspect
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.activations.codebooks import FUNCTIONS
from lowrank_optax.activations.coded_backward import Pointwise, name_of
from lowrank_optax.activations.sampling import outside_of_traces
from lowrank_optax.compat.jax import (
    ClosedJaxpr,
    JaxprEqn,
    Literal,
    bind,
    called_name,
    interpret,
    jaxpr_as_fun,
    new_jaxpr,
    parameters,
    primitive_name,
)
from lowrank_optax.compat.operations import is_passed_on

Var: TypeAlias = Any  # of a jaxpr
Functions: TypeAlias = Sequence[str | Pointwise]

POINTS = np.concatenate([np.arange(-30, 0) * 0.29, [0.0], np.arange(1, 31) * 0.29])
"""Both sides of 0, and 0 itself; no other kink of the functions below is one of them."""

_NAMES = "silu relu relu6 leaky_relu elu selu celu softplus mish hard_tanh hard_sigmoid hard_silu"
_NAMES += " squareplus soft_sign log_sigmoid sigmoid tanh"
_FUNCTIONS: dict[str, tuple[Pointwise, ...]] = {
    "gelu": (FUNCTIONS["gelu_tanh"], FUNCTIONS["gelu_erf"]),
    **{name: (FUNCTIONS[name],) for name in _NAMES.split()},
}

NAMES = tuple(_FUNCTIONS)
"""All that can be asked for by name."""

DEFAULT_NAMES = tuple(n for n in NAMES if n not in ("log_sigmoid", "sigmoid", "tanh"))
"""Those looked for by default. The derivatives of sigmoid and tanh need their output alone, and
log_sigmoid is a part of losses."""


class Known(NamedTuple):
    """A nonlinearity that was found.

    Attributes:
      name: As it is asked for.
      fn: The function, with its options.
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
      ValueError: If a name is unknown, or there is no function.
      TypeError: If one is neither a name nor a function.
    """
    functions = (functions,) if isinstance(functions, str) else tuple(functions)
    if not functions:
        raise ValueError("functions=() must have at least one function to look for.")
    for fn in functions:
        if isinstance(fn, str) and fn not in _FUNCTIONS:
            raise ValueError(f"functions has {fn!r}; known by name are: {', '.join(NAMES)}.")
        if not isinstance(fn, str) and not callable(fn):
            raise TypeError(f"functions has {fn!r}, which is neither a name nor a function.")
    return functions


@dataclasses.dataclass(frozen=True)
class Equations:
    """Equations as a function of one array: equal if they, and their derivative, are the same."""

    jaxpr: ClosedJaxpr = dataclasses.field(compare=False, repr=False)
    name: str
    text: str = dataclasses.field(repr=False)

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, x: jax.Array) -> jax.Array:
        return jaxpr_as_fun(self.jaxpr)(x)[0]


class Finder:
    """Finds the calls of known functions in jaxprs.

    Args:
      functions: Names and functions to look for.
    """

    def __init__(self, functions: Functions) -> None:
        # By the last equation of each.
        self._functions: dict[Any, list[Known]] = {}
        for wanted in functions:
            for fn in _FUNCTIONS[wanted] if isinstance(wanted, str) else (wanted,):
                known = Known(wanted if isinstance(wanted, str) else name_of(fn), fn)
                ends = _equations(fn, jax.ShapeDtypeStruct((1,), jnp.float32))
                self._functions.setdefault(_kind(ends[-1]) if ends else None, []).append(known)

    def find(
        self, made: dict[Var, JaxprEqn], equation: JaxprEqn
    ) -> tuple[Known, Equations, Var] | None:
        """The known function whose last equation this is; its equations and operand.

        Args:
          made: The equation that makes each variable of a jaxpr.
          equation: One of that jaxpr.
        """
        for known in self._functions.get(_kind(equation), ()):
            y: Var = equation.outvars[0]
            if not y.aval.ndim or not jnp.issubdtype(y.aval.dtype, jnp.floating):
                continue
            found = _called(known, equation) or _written(known, made, y)
            if found is None or found[1].aval != y.aval:
                continue
            known, x, equations = found
            jaxpr = new_jaxpr([x], [y], equations, "few_bit")
            values, text = values_of(lambda x, j=jaxpr: jaxpr_as_fun(j)(x)[0], x.aval)
            near = 1e-5 if jnp.finfo(x.aval.dtype).bits > 16 else 1e-2
            if np.allclose(values, known_values(known.fn, str(x.aval.dtype)), near, near):
                # Constants are not in the text, but show in the values.
                return known, Equations(jaxpr, known.name, f"{jaxpr}{text}{values.tobytes()}"), x
        return None


def _called(known: Known, equation: JaxprEqn) -> tuple[Known, Var, list[Any]] | None:
    """The function with the options of a call of it, the operand, and the equation."""
    x, *others = equation.invars
    options = [float(z.val) for z in others if isinstance(z, Literal)]
    if called_name(equation) is None or isinstance(x, Literal) or len(options) < len(others):
        return None
    parameters = list(inspect.signature(known.fn).parameters.values())[1:]
    keywords = {
        p.name: float(f"{value:.6g}")  # 0.2 for what float32 makes of it
        for p, value in zip(parameters, options, strict=False)
        if not np.isclose(value, p.default, rtol=1e-6)
    }
    fn = _partial(known.fn, tuple(keywords.items())) if keywords else known.fn
    return Known(known.name, fn), x, [equation]


def _written(
    known: Known, made: dict[Var, JaxprEqn], y: Var
) -> tuple[Known, Var, list[Any]] | None:
    """The function, the operand, and the equations, where these are those of the function."""
    pattern = _equations(known.fn, jax.ShapeDtypeStruct(y.aval.shape, y.aval.dtype))
    own: dict[Var, JaxprEqn] = {z: e for e in pattern for z in e.outvars}
    same: dict[Var, Var] = {}

    def is_same(mine: Any, other: Any) -> bool:
        literals = isinstance(mine, Literal), isinstance(other, Literal)
        if any(literals):
            return all(literals) and bool(mine.val == other.val)
        if mine in same:
            return same[mine] is other
        same[mine] = other
        if mine not in own:
            return True
        left, right = own[mine], made.get(other)
        return (
            right is not None
            and _kind(left) == _kind(right)
            and len(left.invars) == len(right.invars)
            and all(map(is_same, left.invars, right.invars))
        )

    if not is_same(pattern[-1].outvars[0], y):
        return None
    operands = [other for mine, other in same.items() if mine not in own]
    equations = [made[same[z]] for e in pattern for z in e.outvars if z in same]
    return (known, operands[0], equations) if len(operands) == 1 else None


@functools.cache
def _partial(fn: Pointwise, options: tuple[tuple[str, float], ...]) -> Pointwise:
    """The same object for the same options, by which codebooks are looked up."""
    return functools.partial(fn, **dict(options))


def _equations(fn: Pointwise, aval: Any) -> list[JaxprEqn]:
    return list(jax.make_jaxpr(fn)(aval).jaxpr.eqns)


def _kind(equation: JaxprEqn) -> tuple[str, str]:
    """What an equation does: the function that it calls, or its primitive and its parameters."""
    called = called_name(equation)
    return primitive_name(equation), str(parameters(equation)) if called is None else called


def values_of(fn: Pointwise, aval: Any) -> tuple[np.ndarray, str]:
    """An elementwise function and its derivative in `POINTS`, [2, 61], and the program of both.

    NaN if it is not elementwise.

    Args:
      fn: A function of an array.
      aval: Shape and dtype of the array with which it is traced; the points have this dtype.
    """
    program = jax.make_jaxpr(lambda x, t: jax.jvp(fn, (x,), (t,)))(aval, aval)

    def work() -> np.ndarray:
        x = jnp.asarray(POINTS, aval.dtype)
        inputs = [x, jnp.ones_like(x)]
        results = interpret(program, inputs, rule=_run, constant=jnp.asarray, join=_no_branches)
        return np.stack([np.broadcast_to(np.asarray(y, np.float32), x.shape) for y in results])

    try:
        return outside_of_traces(work), str(program)
    except (NotImplementedError, TypeError, ValueError):
        return np.full((2, POINTS.size), np.nan), ""


@functools.lru_cache(maxsize=256)
def known_values(fn: Pointwise, dtype: str) -> np.ndarray:
    """A function and its derivative in `POINTS`, which are of this dtype, [2, 61]."""
    return values_of(fn, jax.ShapeDtypeStruct(POINTS.shape, jnp.dtype(dtype)))[0]


def _no_branches(index: Any, results: Sequence[Any]) -> Any:
    raise NotImplementedError("A function with branches is not elementwise.")


def _run(equation: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of an elementwise equation for vectors, whatever shape it was traced with."""
    if is_passed_on(equation):
        return operands[:1]  # a number stays one until it meets the vector
    return bind(equation, jnp.broadcast_arrays(*operands))
