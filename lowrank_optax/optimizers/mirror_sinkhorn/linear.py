"""Mirror Sinkhorn for a cost that stays the same: n + m + 1 numbers stand for the iterate.

It is ``exp(F_i + H_j - S C_ij)``, with the sum ``S`` of the step sizes so far: Sinkhorn's iteration
at a temperature ``1/S`` that falls from one half-scaling to the next.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.optimizers.mirror_sinkhorn.averages import (
    Average,
    next_average,
    read_average,
    start_average,
)
from lowrank_optax.optimizers.mirror_sinkhorn.polytope import Polytope
from lowrank_optax.optimizers.mirror_sinkhorn.step import First


class Potentials(NamedTuple):
    """An iterate for a linear cost.

    Attributes:
      row: ``F``, ``[n]``; -inf without mass.
      column: ``H``, ``[m]``; -inf without mass.
      rates: ``S``, ``[]``.
    """

    row: jax.Array
    column: jax.Array
    rates: jax.Array


def log_coupling_of(potentials: Potentials, cost: jax.Array) -> jax.Array:
    """Logarithm of the iterate, ``[n, m]``; a cost of infinity forbids a cell."""
    finite = jnp.where(jnp.isposinf(cost), 0, potentials.rates * cost)
    outer = potentials.row[:, None] + potentials.column[None, :] - finite
    return jnp.where(jnp.isposinf(cost), -jnp.inf, outer)


def half_step(
    potentials: Potentials, cost: jax.Array, problem: Polytope, rate: jax.Array, columns: bool
) -> Potentials:
    """One step: a temperature further down, rows or columns are made right."""
    rates = potentials.rates + rate
    if columns:
        zero = potentials._replace(column=jnp.zeros_like(potentials.column), rates=rates)
        sums = jax.nn.logsumexp(log_coupling_of(zero, cost), axis=0)
        return zero._replace(column=_less(problem.log_columns, sums))
    zero = potentials._replace(row=jnp.zeros_like(potentials.row), rates=rates)
    sums = jax.nn.logsumexp(log_coupling_of(zero, cost), axis=1)
    return zero._replace(row=_less(problem.log_rows, sums))


def run_potentials(
    cost: jax.Array, problem: Polytope, rates: jax.Array, average: Average, first: First
) -> tuple[Potentials, jax.Array]:
    """As many steps as there are rates; also the average coupling, of unit mass."""
    order = (True, False) if first == "columns" else (False, True)
    start = Potentials(problem.log_rows, problem.log_columns, jnp.zeros([], rates.dtype))
    mass = jax.nn.logsumexp(log_coupling_of(start, cost))  # less than 1 with forbidden cells
    start = start._replace(row=start.row - jnp.where(jnp.isneginf(mass), 0, mass))
    coupling = lambda potentials: jnp.exp(log_coupling_of(potentials, cost))

    def advance(carry: Any, rate: jax.Array, columns: bool) -> Any:
        old, averages, count = carry
        new = half_step(old, cost, problem, rate, columns)
        if average != "last":
            couplings = coupling(old), coupling(new)
            averages = next_average(average, averages, couplings, count + 1, rate, new.rates)
        return new, averages, count + 1

    def pair(carry: Any, both: jax.Array) -> tuple[Any, None]:
        # Two steps, so that which is scaled is known when the loop is compiled.
        for rate, columns in zip(both, order, strict=True):
            carry = advance(carry, rate, columns)
        return carry, None

    steps = rates.size
    carry = start, start_average(average, coupling(start)), jnp.zeros([], jnp.int32)
    carry, _ = jax.lax.scan(pair, carry, rates[: steps - steps % 2].reshape(-1, 2))
    if steps % 2:
        carry = advance(carry, rates[-1], order[0])
    potentials, averages, count = carry
    return potentials, read_average(average, averages, coupling(potentials), count)


def _less(log_marginal: jax.Array, sums: jax.Array) -> jax.Array:
    return jnp.where(jnp.isneginf(sums), -jnp.inf, log_marginal - sums)
