"""Any JAX function with its nonlinearities replaced by few-bit ones."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any, Generic, NamedTuple, ParamSpec, TypeAlias, TypeVar

import jax
from jax.extend import core
import numpy as np

from lowrank_optax.activations.calls_report import CallsReport, Users, calls_report
from lowrank_optax.activations.codebooks import codebook
from lowrank_optax.activations.coded_backward import FewBit, Pointwise, few_bit, name_of
from lowrank_optax.activations.finding import (
    DEFAULT_NAMES,
    POINTS,
    Functions,
    Known,
    check_functions,
    values_of,
)
from lowrank_optax.activations.rewriting import Rewriter, Site
from lowrank_optax.activations.sampling import DensityName
from lowrank_optax.matrices.paths import compiled_pattern
from lowrank_optax.quantization.packing import PackingName

P = ParamSpec("P")
R = TypeVar("R")

CallsWhere: TypeAlias = str | Sequence[str] | None


def few_bit_calls(
    fn: Callable[P, R],
    bits: int = 3,
    *,
    functions: Functions = DEFAULT_NAMES,
    where: CallsWhere = None,
    density: DensityName = "uniform",
    packing: PackingName = "auto",
) -> "FewBitCalls[P, R]":
    r"""``fn`` with the nonlinearities in it replaced by few-bit ones, wherever they are called.

    ``fn`` is traced, and in its jaxpr equations that compute a known nonlinearity elementwise
    become one call of its few-bit version: the forward pass runs these very equations, so its
    results are those of ``fn``, and the backward pass keeps codes and not ``x``:

    .. math::
      y = f(x), \qquad \bar x = \bar y \cdot q_{c(x)}, \qquad c(x) \in \{0, \dots, 2^b - 1\}.

    A nonlinearity is known by what it computes, not by its name: ``x * jax.nn.sigmoid(x)``, written
    out, is silu. It has the values and the derivative of the function in ``jax.nn``; so
    ``jnp.maximum(x, 0)``, whose gradient at 0 is a half, is left alone, as norms need it. They are
    found in functions under ``jit``, in ``scan``, ``cond``, ``jax.checkpoint`` (whose policies
    stay) and ``shard_map``, not in functions with a ``custom_vjp`` of their own or in kernels. What
    is few-bit already stays as it is.

    Each call traces ``fn`` anew, so call it inside ``jax.jit``. It can be differentiated, mapped,
    scanned and rematerialised; forward mode and second derivatives raise.

    Args:
      fn: Any function of pytrees. JAX arrays in its arguments are traced; all other arguments reach
        it as they are.
      bits: 1 to 8. Piecewise linear functions take one, which is exact.
      functions: Those to look for: names of functions of ``jax.nn``, or functions of one number,
        which are found where a program computes the same. By default all that are known but
        ``sigmoid`` and ``tanh``, whose backward passes need their output alone, and
        ``log_sigmoid``, which is a part of losses.
      where: Which calls: a regular expression (or a list) found in the names around a call, as
        Linen's modules and ``jax.named_scope`` give them, and its source, as a report prints both:
        ``blocks/mlp MLP.__call__ decoder.py:55``; None for all.
      density: Of the inputs, for which codebooks are the best ones: ``"uniform"`` or ``"normal"``.
      packing: Of the codes; see `few_bit`.

    Returns:
      A function of the same arguments, and with a method `FewBitCalls.report`. It raises a
      ValueError if there is nothing to replace.

    Raises:
      ValueError: If an argument is none of what it can be, or a pattern no regular expression.
      TypeError: If ``fn`` is no function.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> def model(weight, x):
      ...     return jax.nn.silu(x @ weight)
      >>> few = lro.activations.few_bit_calls(model, bits=4)
      >>> weight, x = jnp.eye(4), jnp.linspace(-2, 2, 12).reshape(3, 4)
      >>> print(bool((few(weight, x) == model(weight, x)).all()))
      True
      >>> row = few.report(weight, x).rows[0]
      >>> print(row.function, row.shape, row.bytes_now, row.bytes_then)
      silu (3, 4) 144 8

    Reference:
      Novikov et al., Few-Bit Backward: Quantized Gradients of Activation Functions for Memory
      Footprint Reduction, ICML 2023, https://arxiv.org/abs/2202.00441. Jaxprs:
      https://docs.jax.dev/en/latest/jaxpr.html.
    """
    if not callable(fn):
        raise TypeError(f"fn={fn!r} must be a function.")
    return FewBitCalls(fn, Replacement.of(bits, functions, where, density, packing))


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What is to be replaced, and by what; the arguments of `few_bit_calls`.

    Attributes:
      bits: 1 to 8.
      functions: Which.
      where: Patterns found in the scope or the source of a call; None for all calls.
      density: Of the inputs.
      packing: Of the codes.
      each: Whether a pattern that no call matches is an error, where others are matched.
    """

    bits: int
    functions: tuple[Any, ...]
    where: tuple[str, ...] | None
    density: DensityName
    packing: PackingName
    each: bool = True

    @classmethod
    def of(
        cls,
        bits: int,
        functions: Functions,
        where: CallsWhere,
        density: DensityName,
        packing: PackingName,
    ) -> "Replacement":
        """The same, checked."""
        few_bit(jax.nn.relu, bits, density=density, packing=packing)  # raises
        patterns = (where,) if isinstance(where, str) else where
        for pattern in patterns or ():
            compiled_pattern("where", pattern)
        patterns = None if patterns is None else tuple(patterns)
        return cls(bits, check_functions(functions), patterns, density, packing)

    def program(self, program: core.ClosedJaxpr) -> tuple[core.ClosedJaxpr, list[Site]]:
        """A program with what is found replaced, and what was found.

        Raises:
          ValueError: If some patterns of ``where`` match and another does not.
        """
        calls, matched = [], set()

        def chosen(scope: str, source: str) -> bool:
            calls.append(f"{scope} {source}".strip())
            found = [x for x in self.where or () if re.search(x, calls[-1])]
            matched.update(found)
            return self.where is None or bool(found)

        rewritten, sites = Rewriter(self.functions, self._few, chosen).rewrite(program.jaxpr)
        missing = [x for x in self.where or () if x not in matched]
        if sites and missing and self.each:
            raise ValueError(
                f"where={missing[0]!r} matches no call of what is looked for; there are "
                f"{', '.join(map(repr, dict.fromkeys(calls)))}."
            )
        return core.ClosedJaxpr(rewritten, program.consts), sites

    def nothing(self, what: str) -> ValueError:
        """The error of a program in which nothing is found."""
        names = ", ".join(x if isinstance(x, str) else name_of(x) for x in self.functions)
        places = "" if self.where is None else f" in places that match {', '.join(self.where)}"
        return ValueError(
            f"{what} calls none of the functions that are looked for{places}: {names}. Others can "
            "be asked for by functions=; what is few-bit already stays as it is."
        )

    def _few(self, known: Known, fn: Pointwise) -> FewBit:
        values, _ = values_of(known.fn, jax.ShapeDtypeStruct(POINTS.shape, np.float32))
        exact = len(np.unique(values[1].round(5))) == 2  # piecewise linear, in two pieces
        book = codebook(known.fn, 1 if exact else self.bits, density=self.density)
        return few_bit(fn, codebook=book, packing=self.packing)


class FewBitCalls(Generic[P, R]):
    """What `few_bit_calls` returns.

    Attributes:
      fn: The plain function.
      replacement: What is replaced in it.
    """

    def __init__(self, fn: Callable[P, R], replacement: Replacement) -> None:
        functools.update_wrapper(self, fn)
        self.fn, self.replacement = fn, replacement

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The value of ``fn``, by the same operations.

        Raises:
          ValueError: If nothing is found to replace.
        """
        return run_few_bit(self.replacement, self.fn, args, kwargs)[0]

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", self.fn)
        return f"few_bit_calls({name}, bits={self.replacement.bits})"

    def report(
        self, *args: Any, argnums: int | Sequence[int] | None = None, **kwargs: Any
    ) -> CallsReport:
        """The calls that are found, what they keep, and whether few bits pay; nothing is computed.

        Args:
          args: Of ``fn``: pytrees of arrays or of ``jax.ShapeDtypeStruct``.
          argnums: Which of them are differentiated, as for ``jax.grad``; None for all.
          kwargs: Of ``fn``.

        Returns:
          A table: print it, or read its ``rows``.

        Raises:
          ValueError: If nothing is found to replace.
        """
        chosen = range(len(args)) if argnums is None else np.atleast_1d(argnums) % len(args)
        marks = [jax.tree.map(lambda _, m=i in chosen: m, x) for i, x in enumerate(args)]
        others = jax.tree.map(lambda _: argnums is None, kwargs)
        return report_of(self.replacement, self.fn, args, kwargs, (tuple(marks), others))


class Traced(NamedTuple):
    """A function as a program.

    Attributes:
      program: Its jaxpr.
      inputs: The arrays among the leaves of its arguments.
      places: Which leaves they are.
      result: From the program's results to what the function returns.
    """

    program: core.ClosedJaxpr
    inputs: list[Any]
    places: list[int]
    result: Callable[[list[jax.Array]], Any]


def traced_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Traced:
    """The program of ``fn(*args, **kwargs)``."""
    leaves, tree = jax.tree.flatten((args, dict(kwargs)))
    # Only JAX arrays become tracers: a flag, or a NumPy array, is seen by the function as it is.
    kinds = (jax.Array, jax.ShapeDtypeStruct)
    places = [i for i, x in enumerate(leaves) if isinstance(x, kinds)]
    returned: list[Any] = []

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        whole = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            whole[i] = x
        own_args, own_kwargs = jax.tree.unflatten(tree, whole)
        returned[:] = jax.tree.flatten(fn(*own_args, **own_kwargs))
        return [x for x in returned[0] if isinstance(x, jax.Array)]

    inputs = [leaves[i] for i in places]
    program = jax.make_jaxpr(flat)(*inputs)
    outputs, output_tree = returned

    def result(arrays: list[jax.Array]) -> Any:
        left = iter(arrays)
        whole = [next(left) if isinstance(x, jax.Array) else x for x in outputs]
        return jax.tree.unflatten(output_tree, whole)

    return Traced(program, inputs, places, result)


def run_few_bit(
    replacement: Replacement,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    required: bool = True,
) -> tuple[Any, int]:
    """``fn(*args, **kwargs)`` with its nonlinearities replaced, and the number of those found.

    Args:
      replacement: What is replaced.
      fn: Any function of pytrees.
      args: Of it.
      kwargs: Of it.
      required: Whether finding nothing is an error.
    """
    traced = traced_call(fn, args, kwargs)
    program, sites = replacement.program(traced.program)
    if required and not sites:
        raise replacement.nothing(name_of(fn))
    return traced.result(core.jaxpr_as_fun(program)(*traced.inputs)), len(sites)


def report_of(
    replacement: Replacement,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trained: Any,
) -> CallsReport:
    """The report on a call.

    Args:
      replacement: What is replaced.
      fn: Any function of pytrees.
      args: Of it.
      kwargs: Of it.
      trained: A tree of bools like ``(args, kwargs)``: which arrays are differentiated.
    """
    traced = traced_call(fn, args, kwargs)
    _, sites = replacement.program(traced.program)
    if not sites:
        raise replacement.nothing(name_of(fn))
    marks = jax.tree.leaves(trained)
    jaxpr = traced.program.jaxpr
    inputs = zip(jaxpr.invars, traced.places, strict=True)
    users = Users(jaxpr, [x for x, place in inputs if marks[place]])
    return calls_report(sites, users)
