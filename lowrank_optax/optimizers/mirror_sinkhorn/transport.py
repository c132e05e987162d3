"""Optimal transport for a linear cost: plan, value, and a certificate of how good they are.

For a cost that stays the same, n + m + 1 numbers stand for the iterate of Mirror Sinkhorn:
``exp(F_i + H_j - S C_ij)``, with the sum ``S`` of the step sizes so far. It is Sinkhorn's iteration
at a temperature ``1/S`` that falls from one half-scaling to the next.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from lowrank_optax.optimizers.mirror_sinkhorn.polytope import (
    Polytope,
    check_marginals,
    concrete,
    in_float,
    largest_finite,
    nonzero,
    polytope,
    round_to_polytope,
)
from lowrank_optax.optimizers.mirror_sinkhorn.steps import (
    Average,
    First,
    check_steps,
    next_average,
    rate_at,
    read_average,
    start_average,
)


class Transport(NamedTuple):
    """The result of `optimal_transport`.

    Attributes:
      plan: The coupling ``[n, m]``, rounded: its marginals are exact.
      value: Its cost, ``[]``, at least the optimum. The only part with a gradient.
      lower_bound: A lower bound of the optimum, ``[]``, proved by the potentials.
      row_potential: ``f``, ``[n]``, with ``f_i + g_j <= cost_ij`` in allowed cells.
      column_potential: ``g``, ``[m]``.
    """

    plan: jax.Array
    value: jax.Array
    lower_bound: jax.Array
    row_potential: jax.Array
    column_potential: jax.Array

    @property
    def gap(self) -> jax.Array:
        """How far at most the value is from the optimum, ``[]``."""
        return self.value - self.lower_bound


def optimal_transport(
    cost: ArrayLike,
    row_marginal: ArrayLike,
    column_marginal: ArrayLike,
    steps: int = 500,
    *,
    bound: ArrayLike | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    average: Average = "last",
    first: First = "columns",
    mask: ArrayLike | None = None,
) -> Transport:
    r"""The cheapest coupling of two distributions, by `mirror_sinkhorn` with no regularisation.

    .. math:: \min_P \langle C, P \rangle, \quad P \ge 0, \; P \mathbf 1 = \mu, \;
      P^\top \mathbf 1 = \nu.

    For a cost that stays the same the iterate is :math:`\exp(F_i + H_j - S C_{ij})` with the sum
    :math:`S` of the step sizes: ``n + m + 1`` numbers from step to step, and ``n·m`` more only for
    an average. The potentials also bound the optimum from below.

    ``value`` has the gradient of the optimum (the envelope theorem): the plan by the cost, the
    potentials by the marginals, up to a constant that changes of equal totals do not see. Nothing
    is differentiated through the steps.

    Args:
      cost: ``[n, m]``. Traced NaNs and infinities pass through to ``value`` as NaN.
      row_marginal: Row sums ``[n]``. Rows of no mass are left out.
      column_marginal: Column sums ``[m]``, of the same total.
      steps: Number of half-scalings, a Python int. The gap falls at least as one over its root.
      bound: As in `mirror_sinkhorn`; None for the largest ``|cost|``.
      learning_rate: As in `mirror_sinkhorn`.
      average: As in `mirror_sinkhorn`. For a constant cost without noise the last iterate is best.
      first: Sums that the first step makes right.
      mask: Where mass may be, ``[n, m]`` of bools; None for everywhere. With one, marginals are as
        good as the sweeps of `round_to_polytope` make them, and ``value`` may be below the optimum
        by as much.

    Returns:
      A `Transport`, in float32 (float64 if an argument is).

    Raises:
      ValueError: As `mirror_sinkhorn`, or if ``steps`` is negative, or ``cost`` of another shape or
        not finite in an allowed cell.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> cost = jnp.array([[0.0, 1.0], [2.0, 0.5]])
      >>> rows, columns = jnp.array([0.7, 0.3]), jnp.array([0.4, 0.6])
      >>> found = lro.optimal_transport(cost, rows, columns)
      >>> print(f"{found.value:.3f} {found.lower_bound:.3f}")
      0.450 0.450
      >>> value = lambda cost: lro.optimal_transport(cost, rows, columns).value
      >>> print((100 * jax.grad(value)(cost)).round())
      [[40. 30.]
       [ 0. 30.]]

    Reference:
      Ballu and Berthet, Mirror Sinkhorn: Fast Online Optimization on Transport Polytopes, 2023,
      https://arxiv.org/abs/2211.10420.
    """
    check_steps(learning_rate, bound, first, average)
    if steps < 0:
        raise ValueError(f"steps={steps} must not be negative.")
    check_marginals(row_marginal, column_marginal, mask)
    costs, rows, columns = in_float(cost, row_marginal, column_marginal)
    allowed = None if mask is None else jnp.asarray(mask, bool)
    shape = rows.size, columns.size
    if costs.shape != shape:
        raise ValueError(f"cost must have shape {shape}, as the marginals, not {costs.shape}.")
    known = concrete(costs if allowed is None else jnp.where(allowed, costs, 0))
    if known is not None and not np.isfinite(known).all():
        raise ValueError("cost must be finite in allowed cells: forbid cells by mask.")
    frozen = jax.lax.stop_gradient((costs, rows, columns))
    problem = polytope(*frozen[1:], allowed)
    closed = frozen[0] if allowed is None else jnp.where(allowed, frozen[0], jnp.inf)
    if bound is None:  # the largest |cost| of a cell that can have mass
        alive = jnp.isfinite(problem.log_rows)[:, None] & jnp.isfinite(problem.log_columns)
        bound = largest_finite(jnp.where(alive, closed, 0))
    largest, delta = jnp.asarray(bound), problem.delta
    rate = lambda count: rate_at(count, learning_rate, largest, delta)
    rates = jax.vmap(rate)(jnp.arange(steps))
    found = _solve(closed, problem, rates, average, first)
    changes = [x - y for x, y in zip((costs, rows, columns), frozen, strict=True)]
    prices = (found.plan, found.row_potential, found.column_potential)
    # Changes are zeros, NaN where a cost is infinite: not added up there, but their gradient is.
    slopes = [jnp.where(p == 0, 0, p * x).sum() for p, x in zip(prices, changes, strict=True)]
    return found._replace(value=found.value + sum(slopes))


@partial(jax.jit, static_argnames=("average", "first"))
def _solve(
    cost: jax.Array, problem: Polytope, rates: jax.Array, average: Average, first: First
) -> Transport:
    potentials, mean = _run(cost, problem, rates, average, first)
    plan = problem.total * mean
    plan = round_to_polytope(plan, problem.rows, problem.columns, problem.mask)
    # The largest f and g with f_i + g_j <= cost_ij: minima over what the other leaves of the cost,
    # and 0 for a row or column without an allowed cell.
    temperature = 1 / nonzero(potentials.rates)
    rows = jnp.where(potentials.rates == 0, 0, potentials.row * temperature)
    columns = jnp.min(cost - rows[:, None], axis=0, initial=jnp.inf)
    rows = jnp.min(cost - columns[None, :], axis=1, initial=jnp.inf)
    rows, columns = (jnp.where(jnp.isinf(x), 0, x) for x in (rows, columns))
    # What has no mass has no price.
    paired = lambda mass, price: jnp.where(mass == 0, 0, mass * price).sum()
    lower_bound = paired(problem.rows, rows) + paired(problem.columns, columns)
    return Transport(plan, paired(plan, cost), lower_bound, rows, columns)


class _Potentials(NamedTuple):
    """``F [n]`` and ``H [m]``, -inf without mass, and ``S []``, of an iterate."""

    row: jax.Array
    column: jax.Array
    rates: jax.Array


def _log_coupling(potentials: _Potentials, cost: jax.Array) -> jax.Array:
    """Logarithm of the iterate, ``[n, m]``; a cost of infinity forbids a cell."""
    finite = jnp.where(jnp.isposinf(cost), 0, potentials.rates * cost)
    outer = potentials.row[:, None] + potentials.column[None, :] - finite
    return jnp.where(jnp.isposinf(cost), -jnp.inf, outer)


def _run(
    cost: jax.Array, problem: Polytope, rates: jax.Array, average: Average, first: First
) -> tuple[_Potentials, jax.Array]:
    """One step for each rate; also the average coupling, of unit mass."""
    order = ("column", "row") if first == "columns" else ("row", "column")
    start = _Potentials(problem.log_rows, problem.log_columns, jnp.zeros([], rates.dtype))
    mass = jax.nn.logsumexp(_log_coupling(start, cost))  # less than 1 with forbidden cells
    start = start._replace(row=start.row - jnp.where(jnp.isneginf(mass), 0, mass))
    coupling = lambda potentials: jnp.exp(_log_coupling(potentials, cost))

    def advance(carry: Any, rate: jax.Array, side: str) -> Any:
        old, averages, count = carry
        log_marginal = problem.log_columns if side == "column" else problem.log_rows
        rates = old.rates + rate
        zero = old._replace(**{side: jnp.zeros_like(log_marginal)}, rates=rates)
        axis = 0 if side == "column" else 1
        sums = jax.nn.logsumexp(_log_coupling(zero, cost), axis=axis)
        potential = jnp.where(jnp.isneginf(sums), -jnp.inf, log_marginal - sums)
        new = zero._replace(**{side: potential})
        if average != "last":
            couplings = coupling(old), coupling(new)
            averages = next_average(average, averages, couplings, count + 1, rate, rates)
        return new, averages, count + 1

    def pair(carry: Any, both: jax.Array) -> tuple[Any, None]:
        # Two steps, so that which is scaled is known when the loop is compiled.
        for rate, side in zip(both, order, strict=True):
            carry = advance(carry, rate, side)
        return carry, None

    steps = rates.size
    carry = start, start_average(average, coupling(start)), jnp.zeros([], jnp.int32)
    carry, _ = jax.lax.scan(pair, carry, rates[: steps - steps % 2].reshape(-1, 2))
    if steps % 2:
        carry = advance(carry, rates[-1], order[0])
    potentials, averages, count = carry
    return potentials, read_average(average, averages, coupling(potentials), count)
