"""Partial and unbalanced transport: a row and a column more, for mass that goes nowhere."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from lowrank_optax.optimizers.mirror_sinkhorn.polytope import concrete, in_float


class SlackProblem(NamedTuple):
    """A problem with slack: arguments of `optimal_transport` and `mirror_sinkhorn`, by their names.

    Attributes:
      cost: ``[n + 1, m + 1]``.
      row_marginal: ``[n + 1]``.
      column_marginal: ``[m + 1]``.
      mask: ``[n + 1, m + 1]``, of ``mass``; None of ``penalty``.
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

    With ``mass``, exactly so much is moved, where that is cheapest:

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
    _check(rows, columns, mass, penalty)
    totals = rows.sum(), columns.sum()
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


def _check(
    rows: jax.Array, columns: jax.Array, mass: ArrayLike | None, penalty: ArrayLike | None
) -> None:
    known = None if penalty is None else concrete(penalty)
    if known is not None and not (np.isfinite(known) and known >= 0):
        raise ValueError(f"penalty={penalty} must be finite and not negative.")
    known = None if mass is None else concrete(mass)
    most = concrete(jnp.minimum(rows.sum(), columns.sum()))
    if known is not None and most is not None and not 0 <= known <= most * (1 + 1e-6):
        raise ValueError(f"mass={mass} must be between 0 and the smaller total, {most:.6g}.")
