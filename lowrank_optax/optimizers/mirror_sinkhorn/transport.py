"""Optimal transport for a linear cost: plan, value, a certificate, and slack for mass that stays.

For a cost that stays the same, n + m + 1 numbers stand for the iterate of Mirror Sinkhorn. It is
``exp(F_i + H_j - S C_ij)``, with the sum ``S`` of the step sizes so far: Sinkhorn's iteration at a
temperature ``1/S`` that falls from one half-scaling to the next.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from lowrank_optax.optimizers.mirror_sinkhorn.iterates import (
    Average,
    First,
    check_average,
    check_steps,
    next_average,
    rate_at,
    read_average,
    start_average,
)
from lowrank_optax.optimizers.mirror_sinkhorn.polytope import (
    Polytope,
    concrete,
    in_float,
    largest_finite,
    nonzero,
    polytope,
    round_to_polytope,
)


class Transport(NamedTuple):
    """What `optimal_transport` returns.

    Attributes:
      plan: The coupling ``[n, m]``, rounded: its marginals are exact.
      value: Its cost, ``[]``, at least the optimum. The only part with a gradient.
      lower_bound: Lower bound of the optimum, ``[]``, proved by the potentials.
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
    :math:`S` of the step sizes, so that the state is ``n + m + 1`` numbers, and ``n·m`` more only
    for an average. The potentials also bound the optimum from below.

    ``value`` has the gradient of the optimum (the envelope theorem): the plan by the cost, the
    potentials by the marginals, up to a constant that changes of equal totals do not see. Nothing
    is differentiated through the steps.

    Args:
      cost: ``[n, m]``. Traced NaNs and infinities pass through to ``value`` as NaN.
      row_marginal: Row sums ``[n]``. Rows without mass stay empty.
      column_marginal: Column sums ``[m]``, of the same total.
      steps: Half-scalings, a Python int. The gap falls at least as one over the root of it.
      bound: As in `mirror_sinkhorn`; None for the largest ``|cost|``.
      learning_rate: As in `mirror_sinkhorn`.
      average: As in `mirror_sinkhorn`; for a fixed cost without noise the last iterate is best.
      first: As in `mirror_sinkhorn`.
      mask: Where mass may be, ``[n, m]`` of bools; None for everywhere. With a mask, marginals are
        those of the sweeps of `round_to_polytope`, and ``value`` may be below the optimum by their
        errors.

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
    costs, rows, columns = in_float(cost, row_marginal, column_marginal)
    frozen = jax.lax.stop_gradient((costs, rows, columns))
    problem = polytope(*frozen[1:], mask)
    allowed = problem.mask
    _check_cost(costs, allowed, (rows.size, columns.size))
    closed = frozen[0] if allowed is None else jnp.where(allowed, frozen[0], jnp.inf)
    counts, delta = jnp.arange(steps), problem.delta
    if bound is None:  # of cells that can have mass
        alive = jnp.isfinite(problem.log_rows)[:, None] & jnp.isfinite(problem.log_columns)
        bound = largest_finite(jnp.where(alive, closed, 0))
    largest = jnp.asarray(bound)
    rates = jax.vmap(lambda count: rate_at(count, learning_rate, largest, delta))(counts)
    found = _solve(closed, problem, rates, average, first)
    changes = [x - y for x, y in zip((costs, rows, columns), frozen, strict=True)]
    prices = (found.plan, found.row_potential, found.column_potential)
    # Changes are zeros, NaN where a cost is infinite: not added up there, but their gradient is.
    slopes = [jnp.where(p == 0, 0, p * x).sum() for p, x in zip(prices, changes, strict=True)]
    return found._replace(value=found.value + sum(slopes))


class _Potentials(NamedTuple):
    """An iterate for a linear cost: ``F [n]`` and ``H [m]``, -inf without mass, and ``S []``."""

    row: jax.Array
    column: jax.Array
    rates: jax.Array

    def log_coupling(self, cost: jax.Array) -> jax.Array:
        """Logarithm of the iterate, ``[n, m]``; a cost of infinity forbids a cell."""
        finite = jnp.where(jnp.isposinf(cost), 0, self.rates * cost)
        outer = self.row[:, None] + self.column[None, :] - finite
        return jnp.where(jnp.isposinf(cost), -jnp.inf, outer)

    def half_step(
        self, cost: jax.Array, problem: Polytope, rate: jax.Array, columns: bool
    ) -> "_Potentials":
        """The iterate at a lower temperature, with the right sums of columns, or of rows."""
        name, axis = ("column", 0) if columns else ("row", 1)
        log_marginal = problem.log_columns if columns else problem.log_rows
        zero = self._replace(rates=self.rates + rate, **{name: jnp.zeros_like(log_marginal)})
        sums = jax.nn.logsumexp(zero.log_coupling(cost), axis=axis)
        scaled = jnp.where(jnp.isneginf(sums), -jnp.inf, log_marginal - sums)
        return zero._replace(**{name: scaled})


def _run(
    cost: jax.Array, problem: Polytope, rates: jax.Array, average: Average, first: First
) -> tuple[_Potentials, jax.Array]:
    """One step for each rate; also the average coupling, of unit mass."""
    order = (True, False) if first == "columns" else (False, True)
    start = _Potentials(problem.log_rows, problem.log_columns, jnp.zeros([], rates.dtype))
    mass = jax.nn.logsumexp(start.log_coupling(cost))  # less than 1 with forbidden cells
    start = start._replace(row=start.row - jnp.where(jnp.isneginf(mass), 0, mass))
    coupling = lambda potentials: jnp.exp(potentials.log_coupling(cost))

    def advance(carry: Any, rate: jax.Array, columns: bool) -> Any:
        old, averages, count = carry
        new = old.half_step(cost, problem, rate, columns)
        if average != "last":
            couplings = coupling(old), coupling(new)
            averages = next_average(average, averages, couplings, count + 1, rate, new.rates)
        return new, averages, count + 1

    def pair(carry: Any, both: jax.Array) -> tuple[Any, None]:
        # Two steps, so that what is scaled is known when the loop is compiled.
        for rate, columns in zip(both, order, strict=True):
            carry = advance(carry, rate, columns)
        return carry, None

    carry = start, start_average(average, coupling(start)), jnp.zeros([], jnp.int32)
    pairs, last = rates[: rates.size // 2 * 2].reshape(-1, 2), rates.size % 2
    carry, _ = jax.lax.scan(pair, carry, pairs)
    if last:
        carry = advance(carry, rates[-1], order[0])
    potentials, averages, count = carry
    return potentials, read_average(average, averages, coupling(potentials), count)


@partial(jax.jit, static_argnames=("average", "first"))
def _solve(
    cost: jax.Array, problem: Polytope, rates: jax.Array, average: Average, first: First
) -> Transport:
    potentials, mean = _run(cost, problem, rates, average, first)
    plan = problem.total * mean
    plan = round_to_polytope(plan, problem.rows, problem.columns, problem.mask)
    rows, columns = _dual_potentials(potentials, cost)
    lower_bound = _paired(problem.rows, rows) + _paired(problem.columns, columns)
    return Transport(plan, _paired(plan, cost), lower_bound, rows, columns)


def _dual_potentials(potentials: _Potentials, cost: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest potentials with ``f_i + g_j <= cost_ij``; 0 without an allowed cell."""
    temperature = 1 / nonzero(potentials.rates)
    rows = jnp.where(potentials.rates == 0, 0, potentials.row * temperature)
    columns = jnp.min(cost - rows[:, None], axis=0, initial=jnp.inf)
    rows = jnp.min(cost - columns[None, :], axis=1, initial=jnp.inf)
    return jnp.where(jnp.isinf(rows), 0, rows), jnp.where(jnp.isinf(columns), 0, columns)


def _paired(mass: jax.Array, price: jax.Array) -> jax.Array:
    """The sum of all products, in which zero mass counts 0 even at an infinite price."""
    return jnp.where(mass == 0, 0, mass * price).sum()


def _check_cost(cost: jax.Array, allowed: jax.Array | None, shape: tuple[int, int]) -> None:
    if cost.shape != shape:
        raise ValueError(f"cost must have shape {shape}, as the marginals, not {cost.shape}.")
    known = concrete(cost if allowed is None else jnp.where(allowed, cost, 0))
    if known is not None and not np.isfinite(known).all():
        raise ValueError("cost must be finite in allowed cells: forbid cells by mask.")


class SlackProblem(NamedTuple):
    """A problem with slack: arguments of `optimal_transport` and `mirror_sinkhorn` by name.

    Attributes:
      cost: Array ``[n + 1, m + 1]``.
      row_marginal: Array ``[n + 1]``.
      column_marginal: Array ``[m + 1]``.
      mask: Bools ``[n + 1, m + 1]`` with ``mass``; None with ``penalty``.
    """

    cost: jax.Array
    row_marginal: jax.Array
    column_marginal: jax.Array
    mask: jax.Array | None


def with_slack(
    cost: ArrayLike,
    row_marginal: ArrayLike,
    column_marginal: ArrayLike,
    *,
    mass: ArrayLike | None = None,
    penalty: ArrayLike | None = None,
) -> SlackProblem:
    r"""Transport of a part of the mass, as transport of all of it with one more row and column.

    With ``mass``, exactly that much is moved, where it is cheapest:

    .. math:: \min \langle C, P \rangle, \quad P \mathbf 1 \le \mu, \; P^\top \mathbf 1 \le \nu, \;
      \mathbf 1^\top P \mathbf 1 = \text{mass}.

    Slack costs nothing, and the corner, in which slack would meet slack, is forbidden. With
    ``penalty``, whatever is left where it is costs :math:`\tau` per unit,

    .. math:: \min \langle C, P \rangle + \tau (\lVert \mu - P \mathbf 1 \rVert_1
      + \lVert \nu - P^\top \mathbf 1 \rVert_1), \quad P \mathbf 1 \le \mu, \;
      P^\top \mathbf 1 \le \nu,

    and the corner is free: nothing moves at a cost above :math:`2 \tau`. Totals of the marginals
    may differ in both.

    Args:
      cost: The cost, or the gradient of another function, ``[n, m]``.
      row_marginal: Most that a row may have, ``[n]``.
      column_marginal: Most that a column may have, ``[m]``.
      mass: What is to be moved, at most the smaller total.
      penalty: :math:`\tau`, at least 0. Either this or ``mass``.

    Returns:
      The larger problem. Of its plan, ``plan[:-1, :-1]`` is what moves.

    Raises:
      ValueError: Without one of ``mass`` and ``penalty``, with both, or with one out of its range.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> from lowrank_optax.optimizers import with_slack
      >>> cost = jnp.array([[0.0, 1.0], [1.0, 3.0]])
      >>> problem = with_slack(cost, jnp.array([0.5, 0.5]), jnp.array([0.6, 0.4]), mass=0.7)
      >>> found = lro.optimal_transport(**problem._asdict(), steps=2000)
      >>> plan = found.plan[:-1, :-1]
      >>> print(f"{plan.sum():.3f} {jnp.sum(cost * plan):.2f}")
      0.700 0.30
    """
    if (mass is None) == (penalty is None):
        raise ValueError(f"give either mass or penalty, not mass={mass} and penalty={penalty}.")
    costs, rows, columns = in_float(cost, row_marginal, column_marginal)
    totals = rows.sum(), columns.sum()
    known = None if penalty is None else concrete(penalty)
    if known is not None and not (np.isfinite(known) and known >= 0):
        raise ValueError(f"penalty={penalty} must be finite and not negative.")
    known = None if mass is None else concrete(mass)
    most = concrete(jnp.minimum(*totals))
    if known is not None and most is not None and not 0 <= known <= most * (1 + 1e-6):
        raise ValueError(f"mass={mass} must be between 0 and the smaller total, {most:.6g}.")
    if mass is not None:
        price, amounts = 0, (totals[1] - mass, totals[0] - mass)
    else:
        price, amounts = penalty, (totals[1], totals[0])
    padded = jnp.pad(costs, (0, 1), constant_values=price).at[-1, -1].set(0)
    mask = jnp.ones(padded.shape, bool).at[-1, -1].set(False)
    # Rounding may leave a little less than nothing.
    slack_row, slack_column = (jnp.maximum(jnp.asarray(x, rows.dtype), 0) for x in amounts)
    return SlackProblem(
        padded,
        jnp.append(rows, slack_row),
        jnp.append(columns, slack_column),
        None if mass is None else mask,
    )
