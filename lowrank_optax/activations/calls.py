"""Any JAX function with its nonlinearities replaced by few-bit ones."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any, Generic, NamedTuple, ParamSpec, TypeAlias, TypeVar

import jax
import numpy as np

from lowrank_optax.activations.calls_report import CallsReport, Users, calls_report
from lowrank_optax.activations.codebooks import DensityName, codebook
from lowrank_optax.activations.coded_backward import FewBit, Pointwise, few_bit, name_of
from lowrank_optax.activations.finding import (
    DEFAULT_NAMES,
    Functions,
    Known,
    check_functions,
    known_values,
)
from lowrank_optax.activations.rewriting import Rewriter, Site
from lowrank_optax.compat.jax import ClosedJaxpr, jaxpr_as_fun
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

    ``fn`` is traced, and in its jaxpr the calls of a known nonlinearity become calls of its few-bit
    version. The same equations run in the forward pass, so its results are those of ``fn``; the
    backward pass needs codes and not ``x``:

    .. math::
      y = f(x), \qquad \bar x = \bar y \cdot q_{c(x)}, \qquad c(x) \in \{0, \dots, 2^b - 1\}.

    Functions of ``jax.nn`` are found by the names of their calls, and by their own equations where
    JAX gives them no name, as ``jax.nn.gelu``; the values and the derivative are then compared with
    the known function's. What a program writes out, such as ``x * jax.nn.sigmoid(x)``, is left
    alone. Calls are found in functions under ``jit``, in ``scan``, ``cond``, ``jax.checkpoint``
    (whose policies stay) and ``shard_map``, not in functions with a ``custom_vjp`` of their own or
    in kernels. What is few-bit already stays as it is.

    ``fn`` is traced at each call, so call the result inside ``jax.jit``. It can be differentiated,
    mapped, scanned and rematerialized; forward mode and second derivatives raise.

    Args:
      fn: Any function of pytrees. JAX arrays in its arguments are traced; all other arguments reach
        it as they are.
      bits: 1 to 8. Piecewise linear functions take one, which is exact.
      functions: Functions to look for: names of functions of ``jax.nn``, or functions of one
        number, which are found where a program calls them. By default all known ones except
        ``sigmoid`` and ``tanh``, whose backward passes need their output alone, and
        ``log_sigmoid``, which is a part of losses.
      where: Calls to replace: a regular expression (or a list) found in the names around a call, as
        Linen's modules and ``jax.named_scope`` give them, and its source, as a report prints both:
        ``blocks/mlp MLP.__call__ decoder.py:55``; None for all.
      density: Density of the inputs that codebooks are fitted for: ``"uniform"`` or ``"normal"``.
      packing: Layout of the codes; see `few_bit`.

    Returns:
      A function of the same arguments, with a method `FewBitCalls.report`. It raises a ValueError
      if there is nothing to replace.

    Raises:
      ValueError: If an argument is not one of its choices, or a pattern is not a regular
        expression.
      TypeError: If ``fn`` is not a function.

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
    """The checked arguments of `few_bit_calls`.

    With ``each``, a pattern that no call matches is an error although others are matched.
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
        """Checks the arguments of `few_bit_calls`."""
        few_bit(jax.nn.relu, bits, density=density, packing=packing)  # raises
        patterns = (where,) if isinstance(where, str) else where
        for pattern in patterns or ():
            compiled_pattern("where", pattern)
        patterns = None if patterns is None else tuple(patterns)
        return cls(bits, check_functions(functions), patterns, density, packing)

    def program(self, program: ClosedJaxpr) -> tuple[ClosedJaxpr, list[Site]]:
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
        return ClosedJaxpr(rewritten, program.consts), sites

    def run(
        self, fn: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], required: bool = True
    ) -> tuple[Any, int]:
        """``fn(*args, **kwargs)`` with its nonlinearities replaced, and the number of those found.

        If they are ``required``, finding none is an error.
        """
        traced = traced_call(fn, args, kwargs)
        program, sites = self.program(traced.program)
        if required and not sites:
            raise self.nothing(name_of(fn))
        return traced.result(jaxpr_as_fun(program)(*traced.inputs)), len(sites)

    def report(
        self, fn: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], trained: Any
    ) -> CallsReport:
        """The report on a call; ``trained`` is a tree of bools like ``(args, kwargs)``."""
        traced = traced_call(fn, args, kwargs)
        _, sites = self.program(traced.program)
        if not sites:
            raise self.nothing(name_of(fn))
        marks, jaxpr = jax.tree.leaves(trained), traced.program.jaxpr
        inputs = zip(jaxpr.invars, traced.indices, strict=True)
        return calls_report(sites, Users(jaxpr, [x for x, i in inputs if marks[i]]))

    def nothing(self, what: str) -> ValueError:
        """The error of a program in which nothing is found."""
        names = ", ".join(x if isinstance(x, str) else name_of(x) for x in self.functions)
        where = "" if self.where is None else f" in places that match {', '.join(self.where)}"
        return ValueError(
            f"{what} calls none of the functions that are looked for{where}: {names}. Others can "
            "be asked for by functions=; what is few-bit already stays as it is."
        )

    def _few(self, known: Known, fn: Pointwise) -> FewBit:
        slopes = known_values(known.fn, "float32")[1]
        exact = len(np.unique(slopes.round(5))) == 2  # piecewise linear, in two pieces
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
        return self.replacement.run(self.fn, args, kwargs)[0]

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", self.fn)
        return f"few_bit_calls({name}, bits={self.replacement.bits})"

    def report(
        self, *args: Any, argnums: int | Sequence[int] | None = None, **kwargs: Any
    ) -> CallsReport:
        """The calls that are found, what they save, and whether few bits pay; nothing is computed.

        Args:
          args: Arguments of ``fn``: pytrees of arrays or of ``jax.ShapeDtypeStruct``.
          argnums: Which of them are differentiated, as for ``jax.grad``; None for all.
          kwargs: Keyword arguments of ``fn``.

        Returns:
          A table: print it, or read its ``rows``.

        Raises:
          ValueError: If nothing is found to replace.
        """
        chosen = range(len(args)) if argnums is None else np.atleast_1d(argnums) % len(args)
        marks = [jax.tree.map(lambda _, m=i in chosen: m, x) for i, x in enumerate(args)]
        others = jax.tree.map(lambda _: argnums is None, kwargs)
        return self.replacement.report(self.fn, args, kwargs, (tuple(marks), others))


class Traced(NamedTuple):
    """A call as a program.

    Attributes:
      program: Its jaxpr.
      inputs: The arrays among the leaves of its arguments.
      indices: Which leaves they are.
      result: From the program's results to what the function returns.
    """

    program: ClosedJaxpr
    inputs: list[Any]
    indices: list[int]
    result: Callable[[list[jax.Array]], Any]


def traced_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Traced:
    """The program of ``fn(*args, **kwargs)``."""
    leaves, tree = jax.tree.flatten((args, dict(kwargs)))
    # Only JAX arrays become tracers: a flag, or a NumPy array, is seen by the function as it is.
    kinds = (jax.Array, jax.ShapeDtypeStruct)
    indices = [i for i, x in enumerate(leaves) if isinstance(x, kinds)]
    returned: list[Any] = []

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        whole = list(leaves)
        for i, x in zip(indices, arrays, strict=True):
            whole[i] = x
        own_args, own_kwargs = jax.tree.unflatten(tree, whole)
        returned[:] = jax.tree.flatten(fn(*own_args, **own_kwargs))
        return [x for x in returned[0] if isinstance(x, jax.Array)]

    inputs = [leaves[i] for i in indices]
    program = jax.make_jaxpr(flat)(*inputs)
    outputs, output_tree = returned

    def result(arrays: list[jax.Array]) -> Any:
        left = iter(arrays)
        whole = [next(left) if isinstance(x, jax.Array) else x for x in outputs]
        return jax.tree.unflatten(output_tree, whole)

    return Traced(program, inputs, indices, result)
