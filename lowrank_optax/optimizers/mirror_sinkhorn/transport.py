"""Optimal transport for a linear cost: plan, value, and a certificate of how good they are."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from lowrank_optax.optimizers.mirror_sinkhorn.averages import Average, check_average
from lowrank_optax.optimizers.mirror_sinkhorn.linear import Potentials, run_potentials
from lowrank_optax.optimizers.mirror_sinkhorn.polytope import (
    Polytope,
    check_marginals,
    concrete,
    in_float,
    largest_finite,
    nonzero,
    polytope,
)
from lowrank_optax.optimizers.mirror_sinkhorn.rounding import round_to_polytope
from lowrank_optax.optimizers.mirror_sinkhorn.step import First, check_steps, rate_at


class Transport(NamedTuple):
    """What `optimal_transport` returns.

    Attributes:
      plan: The coupling ``[n, m]``, rounded: its marginals are exact.
      value: Its cost, ``[]``, at least the optimum. The only part with a gradient.
      lower_bound: What the potentials prove about the optimum, ``[]``: it is no less.
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
    :math:`S` of the step sizes, so that ``n + m + 1`` numbers are kept from step to step, and
    ``n·m`` more only for an average. The potentials, each the other's minimum over
    :math:`C_{ij}` less it, also bound the optimum from below.

    ``value`` has the gradient of the optimum (the envelope theorem): the plan by the cost, the
    potentials by the marginals, up to a constant that changes of equal totals do not see. Nothing
    is differentiated through the steps.

    Args:
      cost: ``[n, m]``. Traced NaNs and infinities pass through to ``value`` as NaN.
      row_marginal: Row sums ``[n]``. Rows of no mass are left out.
      column_marginal: Column sums ``[m]``, of the same total.
      steps: Half-scalings, a Python int. The gap falls at least as one over the root of it.
      bound: As in `mirror_sinkhorn`; None for the largest ``|cost|``.
      learning_rate: As in `mirror_sinkhorn`.
      average: As in `mirror_sinkhorn`, where an average is the default: with a cost that stays the
        same, and has no noise, the last iterate is the better one.
      first: Which sums the first step makes right.
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
    check_steps(learning_rate, bound, first)
    check_average(average)
    if steps < 0:
        raise ValueError(f"steps={steps} must not be negative.")
    check_marginals(row_marginal, column_marginal, mask)
    costs, rows, columns = in_float(cost, row_marginal, column_marginal)
    allowed = None if mask is None else jnp.asarray(mask, bool)
    _check_cost(costs, allowed, (rows.size, columns.size))
    frozen = jax.lax.stop_gradient((costs, rows, columns))
    problem = polytope(*frozen[1:], allowed)
    closed = frozen[0] if allowed is None else jnp.where(allowed, frozen[0], jnp.inf)
    counts, delta = jnp.arange(steps), problem.delta
    largest = _largest(closed, problem) if bound is None else jnp.asarray(bound)
    rates = jax.vmap(lambda count: rate_at(count, learning_rate, largest, delta))(counts)
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
    potentials, mean = run_potentials(cost, problem, rates, average, first)
    plan = problem.total * mean
    plan = round_to_polytope(plan, problem.rows, problem.columns, problem.mask)
    rows, columns = dual_potentials(potentials, cost)
    lower_bound = _paired(problem.rows, rows) + _paired(problem.columns, columns)
    return Transport(plan, _paired(plan, cost), lower_bound, rows, columns)


def dual_potentials(potentials: Potentials, cost: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column potentials with ``f_i + g_j <= cost_ij``, as large as they can be.

    Both are minima over what the other leaves of the cost. Where a row or column has no allowed
    cell, they are 0.
    """
    temperature = 1 / nonzero(potentials.rates)
    rows = jnp.where(potentials.rates == 0, 0, potentials.row * temperature)
    columns = jnp.min(cost - rows[:, None], axis=0, initial=jnp.inf)
    rows = jnp.min(cost - columns[None, :], axis=1, initial=jnp.inf)
    return jnp.where(jnp.isinf(rows), 0, rows), jnp.where(jnp.isinf(columns), 0, columns)


def _paired(mass: jax.Array, price: jax.Array) -> jax.Array:
    """The sum of all products; what has no mass has no price."""
    return jnp.where(mass == 0, 0, mass * price).sum()


def _largest(cost: jax.Array, problem: Polytope) -> jax.Array:
    """The largest ``|cost|`` of a cell that can have mass."""
    alive = jnp.isfinite(problem.log_rows)[:, None] & jnp.isfinite(problem.log_columns)
    return largest_finite(jnp.where(alive, cost, 0))


def _check_cost(cost: jax.Array, allowed: jax.Array | None, shape: tuple[int, int]) -> None:
    if cost.shape != shape:
        raise ValueError(f"cost must have shape {shape}, as the marginals, not {cost.shape}.")
    known = concrete(cost if allowed is None else jnp.where(allowed, cost, 0))
    if known is not None and not np.isfinite(known).all():
        raise ValueError("cost must be finite in allowed cells: forbid cells by mask.")
