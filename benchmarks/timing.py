"""Times of several functions in one run, taken in turn: these ratios survive a noisy machine."""

from collections.abc import Callable
import os
import time
from typing import Any

# LAPACK's own threads fight with XLA's for the cores; read when JAX loads LAPACK.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
from rich.console import Console
from rich.table import Table


class Program:
    """A compiled `step(carry, *arguments) -> carry`, which writes over its carry."""

    def __init__(self, compiled: Any, carry: Any, *arguments: Any) -> None:
        self.compiled, self.carry, self.arguments = compiled, carry, arguments

    def __call__(self, calls: int = 1) -> float:
        """Runs the step, several times in a row if so told; returns the seconds of one."""
        began = time.perf_counter()
        for _ in range(calls):
            self.carry = self.compiled(self.carry, *self.arguments)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - began) / calls


class Stepper(Program):
    """A program of a step that is compiled here, with a copy of its carry."""

    def __init__(self, step: Callable[..., Any], carry: Any, *arguments: Any) -> None:
        carry = jax.tree.map(lambda x: x.copy(), carry)
        compiled = jax.jit(step, donate_argnums=0).lower(carry, *arguments).compile()
        super().__init__(compiled, carry, *arguments)


def milliseconds(steppers: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each over rounds in which all take their turn, after one warm-up."""
    seconds = [[stepper() for stepper in steppers.values()] for _ in range(rounds + 1)]
    medians = np.median(seconds[1:], axis=0) * 1e3
    return dict(zip(steppers, medians.tolist(), strict=True))


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Prints a table; floats with three significant digits."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row))
    Console(width=100).print(table)
