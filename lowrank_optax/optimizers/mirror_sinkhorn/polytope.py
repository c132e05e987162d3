"""The transport polytope: couplings with given row and column sums, and rounding to it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np


class Polytope(NamedTuple):
    """Couplings with given row and column sums, and with zeros where no mass may be.

    Attributes:
      rows: Row sums ``[n]``.
      columns: Column sums ``[m]``, with the total of ``rows``.
      total: Their total, ``[]``.
      log_rows: Logarithm of the row sums of unit mass; -inf without mass.
      log_columns: Logarithm of the column sums of unit mass.
      mask: Where mass may be, ``[n, m]``, or None for everywhere.
    """

    rows: jax.Array
    columns: jax.Array
    total: jax.Array
    log_rows: jax.Array
    log_columns: jax.Array
    mask: jax.Array | None

    @property
    def start(self) -> jax.Array:
        """Logarithm of the independent coupling, of unit mass, without the forbidden cells."""
        outer = self.log_rows[:, None] + self.log_columns[None, :]
        if self.mask is None:
            return outer
        allowed = jnp.where(self.mask, outer, -jnp.inf)
        mass = jax.nn.logsumexp(allowed)
        return jnp.where(jnp.isneginf(mass), allowed, allowed - mass)

    @property
    def delta(self) -> jax.Array:
        """What the step size needs: the largest ``|log|`` of a row sum and of a column sum."""
        return largest_finite(self.log_rows) + largest_finite(self.log_columns)


def polytope(
    row_marginal: ArrayLike, column_marginal: ArrayLike, mask: ArrayLike | None = None
) -> Polytope:
    """The polytope of two marginals, refused where it can be seen to be empty."""
    check_marginals(row_marginal, column_marginal, mask)
    rows, columns = in_float(row_marginal, column_marginal)
    total, other = rows.sum(), columns.sum()
    unit_rows, unit_columns = rows / nonzero(total), columns / nonzero(other)
    allowed = None if mask is None else jnp.asarray(mask, bool)
    return Polytope(
        rows, unit_columns * total, total, jnp.log(unit_rows), jnp.log(unit_columns), allowed
    )


def check_marginals(
    row_marginal: ArrayLike, column_marginal: ArrayLike, mask: ArrayLike | None = None
) -> None:
    """Raises ValueError where arguments make no polytope; traced values are not looked at."""
    marginals = {"row_marginal": row_marginal, "column_marginal": column_marginal}
    for name, x in marginals.items():
        if np.ndim(x) != 1:
            raise ValueError(f"{name} must be a vector, not of shape {np.shape(x)}.")
    shape = (np.size(row_marginal), np.size(column_marginal))
    if mask is not None and np.shape(mask) != shape:
        raise ValueError(f"mask must have shape {shape}, one for each cell, not {np.shape(mask)}.")
    known = {name: concrete(x) for name, x in marginals.items()}
    for name, x in known.items():
        if x is not None and not (np.isfinite(x).all() and (x >= 0).all()):
            raise ValueError(f"{name} must be finite and not negative, not {x}.")
    rows, columns = known["row_marginal"], known["column_marginal"]
    if rows is None or columns is None:
        return
    totals = float(rows.sum()), float(columns.sum())
    if abs(totals[0] - totals[1]) > 1e-4 * max(totals):
        raise ValueError(
            f"row_marginal sums to {totals[0]:.6g} and column_marginal to {totals[1]:.6g}; they "
            "must have the same total: scale them, or see with_slack."
        )
    allowed = None if mask is None else concrete(mask)
    if allowed is not None:
        _check_mask(rows, columns, allowed.astype(bool))


def _check_mask(rows: np.ndarray, columns: np.ndarray, allowed: np.ndarray) -> None:
    allowed = allowed & (rows > 0)[:, None] & (columns > 0)[None, :]
    for name, marginal, axis in (("row", rows, 1), ("column", columns, 0)):
        stuck = np.flatnonzero((marginal > 0) & ~allowed.any(axis=axis))
        if stuck.size:
            raise ValueError(
                f"mask allows no cell with mass in {name} {stuck[0]}, whose sum must be "
                f"{marginal[stuck[0]]:.6g}."
            )


def concrete(x: Any) -> np.ndarray | None:
    """The values in NumPy, floats in float64; None while they are traced or on other hosts."""
    if isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    values = np.asarray(x)
    return values if values.dtype == bool else values.astype(np.float64)


def in_float(*arrays: ArrayLike) -> list[jax.Array]:
    """The arrays in their common dtype, float32 at least."""
    converted = [jnp.asarray(x) for x in arrays]
    dtype = jnp.result_type(jnp.float32, *converted)
    return [x.astype(dtype) for x in converted]


def nonzero(x: jax.Array) -> jax.Array:
    """``x``, with 1 for 0, to divide by."""
    return jnp.where(x == 0, 1, x)


def largest_finite(x: jax.Array) -> jax.Array:
    """The largest finite ``|x|``, or 0 if there is no finite element."""
    return jnp.max(jnp.where(jnp.isinf(x), 0, jnp.abs(x)), initial=0)


def round_to_polytope(
    plan: ArrayLike,
    row_marginal: ArrayLike,
    column_marginal: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    sweeps: int = 100,
) -> jax.Array:
    r"""A coupling with exactly these marginals, near a matrix that has them nearly.

    Rows, then columns, with too much are scaled down, and what is missing then is put back as an
    outer product:

    .. math::
      P' = \mathrm{diag}\Big(\min\big(\tfrac{\mu}{P \mathbf 1}, 1\big)\Big) P, \quad
      P'' = P' \mathrm{diag}\Big(\min\big(\tfrac{\nu}{P'^\top \mathbf 1}, 1\big)\Big), \quad
      P'' + \frac{e_r e_c^\top}{\lVert e_r \rVert_1},

    with :math:`e_r = \mu - P'' \mathbf 1` and :math:`e_c = \nu - P''^\top \mathbf 1`. A linear cost
    changes by at most twice its largest entry times the sum of what the marginals were off.

    The outer product would put mass into forbidden cells. With a ``mask``, ``sweeps`` iterations of
    Sinkhorn balance the matrix on allowed cells alone. What is missing then comes with a second
    matrix, mixed in with a weight of twice the largest relative error: a smoother version of the
    first, balanced as well. Marginals are as good as those of the second, and never right where no
    coupling fits the mask.

    Args:
      plan: A matrix ``[n, m]``, not negative.
      row_marginal: Row sums ``[n]``.
      column_marginal: Column sums ``[m]``, of the same total.
      mask: Where mass may be, ``[n, m]``; None for everywhere.
      sweeps: Iterations of Sinkhorn with a mask; no effect without.

    Returns:
      The coupling ``[n, m]``, float32 (float64 if an argument is). NaNs pass through.

    Raises:
      ValueError: If shapes do not fit, marginals are negative, not finite or of different totals,
        or a row or column with mass has no allowed cell (traced values are not looked at).

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> plan = lro.round_to_polytope(
      ...     jnp.array([[0.4, 0.2], [0.1, 0.2]]), jnp.array([0.5, 0.5]), jnp.array([0.5, 0.5])
      ... )
      >>> print((1000 * plan).round())
      [[333. 167.]
       [167. 333.]]

    Reference:
      Altschuler et al., Near-linear time approximation algorithms for optimal transport via
      Sinkhorn iteration, 2017, https://arxiv.org/abs/1705.09634, Algorithm 2.
    """
    shape = (np.size(row_marginal), np.size(column_marginal))
    if np.shape(plan) != shape:
        raise ValueError(f"plan must have shape {shape}, as the marginals, not {np.shape(plan)}.")
    if sweeps < 0:
        raise ValueError(f"sweeps={sweeps} must not be negative.")
    check_marginals(row_marginal, column_marginal, mask)
    matrix, rows, columns = in_float(plan, row_marginal, column_marginal)
    if mask is None:
        return _fill(_cut(matrix, rows, columns), rows, columns)
    allowed = jnp.asarray(mask, bool)
    matrix = _balance(jnp.where(allowed, matrix, 0), rows, columns, sweeps)
    return _mix(_cut(matrix, rows, columns), rows, columns, allowed, sweeps)


def _cut(matrix: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Rows, then columns, scaled down to their sums where they have more."""
    for axis, marginal in ((1, rows), (0, columns)):
        sums = matrix.sum(axis=axis)
        over = sums > marginal
        factor = jnp.where(over, marginal / jnp.where(over, sums, 1), 1)
        matrix = matrix * jnp.expand_dims(factor, axis)
    return matrix


def _missing(matrix: jax.Array, rows: jax.Array, columns: jax.Array) -> list[jax.Array]:
    """What rows and columns lack. A NaN is not below 0, and stays."""
    lacks = [marginal - matrix.sum(axis=axis) for axis, marginal in ((1, rows), (0, columns))]
    return [jnp.where(x < 0, 0, x) for x in lacks]


def _fill(matrix: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """With what is missing, as an outer product."""
    row, column = _missing(matrix, rows, columns)
    return matrix + row[:, None] * (column / nonzero(row.sum()))[None, :]


def _mix(
    matrix: jax.Array, rows: jax.Array, columns: jax.Array, allowed: jax.Array, sweeps: int
) -> jax.Array:
    """With what is missing, in a little of a second matrix with mass in every allowed cell.

    That is the first at a fifth of the inverse temperature: near it, and quick to balance.
    """
    row, column = _missing(matrix, rows, columns)
    errors = jnp.append(row / nonzero(rows), column / nonzero(columns))
    share = jnp.clip(2 * errors.max(initial=0), jnp.finfo(matrix.dtype).eps, 1)
    more = (1 - share) / share
    independent = rows[:, None] * columns[None, :]
    density = jnp.maximum(matrix / nonzero(independent), 1e-12)
    second = jnp.where(allowed, independent * density**0.2, 0)
    second = _balance(second, rows + more * row, columns + more * column, sweeps)
    return (1 - share) * matrix + share * second


def _balance(matrix: jax.Array, rows: jax.Array, columns: jax.Array, sweeps: int) -> jax.Array:
    """Sinkhorn's iterations; on the matrix, as its factors diverge where no coupling exists."""

    def sweep(matrix: jax.Array, _: None) -> tuple[jax.Array, None]:
        for axis, marginal in ((1, rows), (0, columns)):
            factor = marginal / nonzero(matrix.sum(axis=axis))
            matrix = matrix * jnp.expand_dims(factor, axis)
        return matrix, None

    return jax.lax.scan(sweep, matrix, length=sweeps)[0]
