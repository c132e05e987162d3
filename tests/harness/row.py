"""One row of the table: a transformation, how it is made, and what it promises."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any

import jax
import optax

from harness.trees import (
    GRADIENTS,
    PARAMS,
    Tree,
    assert_close,
    assert_mostly_close,
    assert_same_types,
    at,
    cast,
    stack,
)

Step = Callable[..., tuple[Tree, Tree, Tree]]


@dataclass(frozen=True)
class Convergence:
    """How a transformation reaches the known minima of `harness.convergence`.

    Attributes:
        learning_rate: replaces the row's own.
        steps: number of updates.
        tolerance: largest distance from a minimum, in every coordinate.
        overrides: other keyword arguments that replace the row's own.
    """

    learning_rate: Any
    steps: int = 3000
    tolerance: float = 3e-2
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Row:
    """A transformation and what is to be known about it to check it.

    Attributes:
        name: how the tests call it.
        factory: makes the transformation from keyword arguments.
        kwargs: those arguments; a basis must be refreshed within five steps.
        static_args: the names that `optax.inject_hyperparams` must not trace.
        convergence: None only with a reason under `exceptions["converges"]`.
        basis: name of the state's field that holds the bases of the subspaces.
        quantized: its state is stored in codes, some of which rounding may flip.
        exceptions: name of a check the transformation fails by its nature -> the reason. Such a
            check has to fail: an exception that is no longer needed is reported.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    kwargs: Mapping[str, Any]
    static_args: tuple[str, ...] = ()
    convergence: Convergence | None = None
    basis: str | None = None
    quantized: bool = False
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.convergence is None and "converges" not in self.exceptions:
            raise ValueError(f"row {self.name!r} has neither `convergence` nor a reason for it")

    def make(self, **overrides: Any) -> optax.GradientTransformation:
        """The transformation, with some arguments replaced."""
        return self.factory(**{**self.kwargs, **overrides})

    def takes(self, argument: str) -> bool:
        """Whether the factory has an argument of this name."""
        return argument in signature(self.factory).parameters

    @cached_property
    def tx(self) -> optax.GradientTransformation:
        return self.make()

    @cached_property
    def step(self) -> Step:
        """The jitted step, compiled once for all checks that use it."""
        return jax.jit(make_step(self.tx))

    def assert_close(self, actual: Tree, expected: Tree) -> None:
        """Two programs' updates differ by rounding, or by the codes that rounding flips."""
        compare = assert_mostly_close if self.quantized else assert_close
        compare(actual, expected)

    def types(self, dtype: Any) -> tuple[Tree, Tree, Tree]:
        """Parameters and, as shapes, the state and the results of a step in one dtype."""
        if dtype not in self.types_by_dtype:
            params, gradients = cast(PARAMS, dtype), cast(at(GRADIENTS, 0), dtype)
            state = jax.eval_shape(self.tx.init, params)
            after = jax.eval_shape(make_step(self.tx), params, state, gradients)
            self.types_by_dtype[dtype] = params, state, after
        return self.types_by_dtype[dtype]

    @cached_property
    def types_by_dtype(self) -> dict[Any, tuple[Tree, Tree, Tree]]:
        return {}

    def run(self, params: Tree, gradients: Tree) -> Tree:
        """The updates for gradients of several steps, stacked like them."""
        return run(self.tx, params, gradients, self.step)

    @cached_property
    def trajectory(self) -> Tree:
        """The updates for `GRADIENTS` from `PARAMS`: the result others are compared with."""
        return self.run(PARAMS, GRADIENTS)


def make_step(tx: optax.GradientTransformation) -> Step:
    """Makes `(params, state, gradients, **extra) -> (params, state, updates)`."""

    def step(params: Tree, state: Tree, gradients: Tree, **extra: Any) -> tuple[Tree, Tree, Tree]:
        updates, state = tx.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state, updates

    return step


def run(
    tx: optax.GradientTransformation, params: Tree, gradients: Tree, step: Step | None = None
) -> Tree:
    """The updates of a jitted step, `[steps, ...]` as the gradients; its state keeps its types."""
    step = jax.jit(make_step(tx)) if step is None else step
    initial = state = tx.init(params)
    updates = []
    for i in range(len(jax.tree.leaves(gradients)[0])):
        params, state, update = step(params, state, at(gradients, i))
        updates.append(update)
    assert_same_types(state, initial)
    return stack(updates)
