"""The transport polytope a problem lives on: its marginals, checked, and where it starts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np


class Polytope(NamedTuple):
    """Couplings with given row and column sums, and with zeros where no mass may be.

    Attributes:
      rows: Row sums ``[n]``, of any common total.
      columns: Column sums ``[m]``, of the total of ``rows``.
      total: That total, ``[]``.
      log_rows: Logarithm of the row sums of unit mass; -inf without mass.
      log_columns: That of the column sums.
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
    """Raises where arguments make no polytope; values that are traced are not looked at.

    Raises:
      ValueError: If shapes do not fit, a marginal is negative or not finite, totals differ, or a
        row or column with mass has no allowed cell.
    """
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
            raise ValueError(f"mask allows no cell with mass in {name} {stuck[0]}, which has some.")


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
    """The largest ``|x|`` but for infinities; 0 of nothing."""
    return jnp.max(jnp.where(jnp.isinf(x), 0, jnp.abs(x)), initial=0)
