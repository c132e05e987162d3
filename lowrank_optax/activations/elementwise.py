"""What a jaxpr computes elementwise from one of its arrays, and the values of that in a few points.

Such a piece of a program is a function of one number, whatever the equations it is written in.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from lowrank_optax.activations.outside_traces import outside_of_traces

Var: TypeAlias = Any  # of a jaxpr

_ARITHMETIC = """abs add add_any and ceil clamp convert_element_type copy cos cosh cbrt div eq erf
erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p log2 logistic lt max min
mul ne neg not one_minus_square or pow rem round rsqrt select_n sign sin sinh sqrt square
stop_gradient sub tan tanh xor
"""
_ELEMENTWISE = frozenset(_ARITHMETIC.split())
# What a tangent is written with, beside those: that of erf, and what passes a number on.
_OF_DERIVATIVES = frozenset(["bitcast_convert_type", "polynomial"])
_PASSED_ON = frozenset(
    ["broadcast_in_dim", "copy", "copy_p", "pcast", "pvary", "reshard", "stop_gradient"]
)
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "closed_call": "call_jaxpr"}
_LONGEST = 32  # equations of a nonlinearity: GELU has eight


class Pieces:
    """The elementwise functions of one array each in a jaxpr.

    Args:
      jaxpr: Looked at without what is inside scans, branches and the like.
    """

    def __init__(self, jaxpr: core.Jaxpr) -> None:
        self._made: dict[Var, core.JaxprEqn] = {}
        self._roots: dict[Var, tuple[Var, ...] | None] = {}  # None: of no array, a constant
        for x in (*jaxpr.constvars, *jaxpr.invars):
            self._roots[x] = _root(x)
        for equation in jaxpr.eqns:
            common = self._common_roots(equation)
            for x in equation.outvars:
                self._made[x] = equation
                self._roots[x] = common if common is None else (*common, *_root(x))

    def roots(self, x: Var) -> tuple[Var, ...]:
        """The arrays, the earliest first, each of which alone gives ``x`` elementwise."""
        return tuple(root for root in self._roots[x] or () if root is not x)

    def equations(self, root: Var, x: Var) -> list[core.JaxprEqn] | None:
        """Those that make ``x`` of ``root``, in their order; None if they are too many."""
        found: dict[int, core.JaxprEqn] = {}

        def visit(y: Var) -> bool:
            if isinstance(y, core.Literal) or y is root:
                return True
            equation = self._made[y]
            if id(equation) not in found:
                if len(found) == _LONGEST or not all(visit(z) for z in equation.invars):
                    return False
                found[id(equation)] = equation
            return True

        return list(found.values()) if visit(x) else None

    def values(self, root: Var, x: Var, points: np.ndarray) -> np.ndarray | None:
        """``x`` where ``root`` is these points, in float32; None if that is no such function."""
        equations = self.equations(root, x)
        if equations is None:
            return None
        results = evaluate([root], [x], equations, [points])
        return None if results is None else results[0]

    def _common_roots(self, equation: core.JaxprEqn) -> tuple[Var, ...] | None:
        """The arrays that each alone give the result of an equation."""
        if not is_elementwise(equation):
            return ()
        inputs = [x for x in equation.invars if not isinstance(x, core.Literal)]
        known = [self._roots[x] for x in inputs]
        varying = [roots for roots in known if roots is not None]
        if not varying:
            return None
        if equation.primitive.name == "broadcast_in_dim":
            return ()
        common = set(varying[0]).intersection(*varying[1:])
        y: Var = equation.outvars[0]
        return tuple(
            root for root in varying[0] if root in common and root.aval.shape == y.aval.shape
        )


def _root(x: Var) -> tuple[Var, ...]:
    aval = x.aval
    dtype = getattr(aval, "dtype", None)
    floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    return (x,) if floating and aval.ndim else ()


def is_elementwise(equation: core.JaxprEqn) -> bool:
    """Whether each number of the one result is of the number in its place in the operands."""
    name = equation.primitive.name
    if len(equation.outvars) != 1 or equation.effects:
        return False
    if name == "broadcast_in_dim":
        operand: Var = equation.invars[0]
        return not operand.aval.shape
    if name not in _CALLS:
        return name in _ELEMENTWISE
    inner = equation.params[_CALLS[name]]
    if any(np.ndim(x) for x in inner.consts):
        return False
    return all(map(is_elementwise, inner.jaxpr.eqns))


def evaluate(
    inputs: list[Var], outputs: list[Var], equations: Iterable[core.JaxprEqn], values: list[Any]
) -> list[np.ndarray] | None:
    """The results of elementwise equations at vectors of numbers, whatever their own shape.

    Floating point numbers are float32 in between, also where the program's are of 16 or 64 bits.

    Returns:
      NumPy arrays; None where an equation is no elementwise one.
    """

    def work() -> list[np.ndarray]:
        env = dict(zip(inputs, map(_wide, values), strict=True))
        _run(env, equations)
        shape = np.shape(values[0])
        return [np.broadcast_to(np.asarray(_read(env, x)), shape) for x in outputs]

    try:
        return outside_of_traces(work)
    except NotImplementedError:
        return None


def _run(env: dict[Var, Any], equations: Iterable[core.JaxprEqn]) -> None:
    for equation in equations:
        operands = [_read(env, x) for x in equation.invars]
        results = _results(equation, operands)
        env.update(zip(equation.outvars, results, strict=True))


def _results(equation: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        inner = params[_CALLS[name]]
        env = dict(zip(inner.jaxpr.constvars, map(_wide, inner.consts), strict=True))
        env.update(zip(inner.jaxpr.invars, operands, strict=True))
        _run(env, inner.jaxpr.eqns)
        return [_read(env, x) for x in inner.jaxpr.outvars]
    if name in _PASSED_ON:
        return [operands[0]]  # a number stays one until it meets the vector
    if name == "convert_element_type":
        dtype = params["new_dtype"]
        floating = jnp.issubdtype(dtype, jnp.floating)
        return [operands[0].astype(jnp.float32 if floating else dtype)]
    bind: Callable[..., Any] = equation.primitive.bind
    if name == "bitcast_convert_type":  # of bits as the program has them
        operand: Var = equation.invars[0]
        if jnp.dtype(operand.aval.dtype).itemsize != jnp.dtype(params["new_dtype"]).itemsize:
            raise NotImplementedError(name)
        return [_wide(bind(operands[0].astype(operand.aval.dtype), **params))]
    if name not in _ELEMENTWISE and name not in _OF_DERIVATIVES:
        raise NotImplementedError(name)
    return [bind(*jnp.broadcast_arrays(*operands), **params)]


def _read(env: dict[Var, Any], x: Any) -> Any:
    return _wide(x.val) if isinstance(x, core.Literal) else env[x]


def _wide(value: Any) -> jax.Array:
    x = jnp.asarray(value)
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
