"""Steps of Mirror Sinkhorn, their size and order, and the averages of the iterates."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.optimizers.mirror_sinkhorn.polytope import concrete

First = Literal["columns", "rows"]
Average = Literal["uniform", "weighted", "suffix", "last"]
# A bound below this counts as 0, and the step as one that moves nothing: rates stay finite.
LEAST_BOUND = 1e-30


def scaled(log_coupling: jax.Array, log_marginal: jax.Array, axis: int) -> jax.Array:
    """Half an iteration of Sinkhorn: sums along ``axis`` become the marginal exactly.

    Rows and columns without mass stay so.
    """
    sums = jax.nn.logsumexp(log_coupling, axis=axis, keepdims=True)
    shift = jnp.expand_dims(log_marginal, axis) - sums
    return log_coupling + jnp.where(jnp.isneginf(sums), 0, shift)


def columns_next(count: jax.Array, first: First) -> jax.Array:
    """Whether step ``count``, from 0, scales columns."""
    return (count % 2 == 0) == (first == "columns")


def rate_at(
    count: jax.Array,
    learning_rate: optax.ScalarOrSchedule | None,
    bound: jax.Array,
    delta: jax.Array,
) -> jax.Array:
    """The size of step ``count``, from 0: that of Theorem 3.1 without ``learning_rate``."""
    if learning_rate is not None:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return jnp.asarray(rate, delta.dtype)
    enough = bound > LEAST_BOUND
    step = jnp.sqrt(delta / (count + 1).astype(delta.dtype))
    return jnp.where(enough, step / jnp.where(enough, bound, 1), 0)


def check_steps(learning_rate: Any, bound: Any, first: Any) -> None:
    """Raises ValueError if both rates are given, or ``bound`` or ``first`` is out of range."""
    if learning_rate is not None and bound is not None:
        raise ValueError(
            "bound sets the default step size: give bound or learning_rate, not "
            f"bound={bound} and learning_rate={learning_rate}."
        )
    known = None if bound is None else concrete(bound)
    if known is not None and not (np.isfinite(known).all() and (known >= 0).all()):
        raise ValueError(f"bound={bound} must be finite and not negative: the largest |gradient|.")
    if first not in get_args(First):
        raise ValueError(f"first={first!r} must be 'columns' or 'rows'.")


def check_average(average: Any) -> None:
    """Raises ValueError if the average is unknown."""
    if average not in get_args(Average):
        raise ValueError(f"average={average!r} must be one of {', '.join(get_args(Average))}.")


def start_average(kind: Average, coupling: jax.Array) -> tuple[Any, Any]:
    """The average of the first iterate, and zeros for that of the iterates before the suffix."""
    if kind == "last":
        return (), ()
    return coupling, jnp.zeros_like(coupling) if kind == "suffix" else ()


def next_average(
    kind: Average,
    averages: tuple[Any, Any],
    couplings: tuple[jax.Array, jax.Array],
    count: jax.Array,
    rate: jax.Array,
    rates: jax.Array,
) -> tuple[Any, Any]:
    """The averages with one iterate more.

    Args:
      kind: The average.
      averages: The averages before.
      couplings: The iterates before and after the step.
      count: Number of steps with this one; there is one iterate more.
      rate: Size of the step.
      rates: Sum of the sizes of all steps up to this one.
    """
    average, earlier = averages
    old, new = couplings
    if kind == "last":
        return averages
    if kind == "uniform":
        return average + (new - average) / (count + 1), earlier
    if kind == "weighted":
        # Each iterate weighs as much as the gradient taken at it moves the next, as in the bound.
        return average + (old - average) * (rate / jnp.where(rates == 0, 1, rates)), earlier
    window = _window(count)
    restart = window == 1
    earlier = jnp.where(restart, average, earlier)
    return jnp.where(restart, new, average + (new - average) / window), earlier


def read_average(
    kind: Average, averages: tuple[Any, Any], coupling: jax.Array, count: jax.Array
) -> jax.Array:
    """The average after ``count`` steps; ``coupling`` is the last iterate."""
    average, earlier = averages
    if kind == "last":
        return coupling
    if kind != "suffix":
        return average
    window = _window(count)
    before = (count + 1 - window + 1) // 2
    return (window * average + before * earlier) / (window + before)


def _window(count: jax.Array) -> jax.Array:
    """Number of iterates since the last with a power of two as its number, from 1, with that."""
    iterate = count + 1
    return iterate - (1 << (31 - jax.lax.clz(iterate))) + 1
