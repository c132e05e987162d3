"""Averages of iterates, in which noise and the swing between rows and columns cancel."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

Average = Literal["uniform", "weighted", "suffix", "last"]


def check_average(average: Any) -> None:
    """Raises a ValueError if there is no such average."""
    if average not in get_args(Average):
        raise ValueError(f"average={average!r} must be one of {', '.join(get_args(Average))}.")


def start_average(kind: Average, coupling: jax.Array) -> tuple[Any, Any]:
    """The average of the first iterate, and of the iterates before those averaged: none yet."""
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
      kind: Which.
      averages: As they were.
      couplings: The iterates before and after the step.
      count: Steps with this one: there is one iterate more.
      rate: The step's size.
      rates: The sum of all up to it.
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
    """What the averages stand for after ``count`` steps; ``coupling`` is the last iterate."""
    average, earlier = averages
    if kind == "last":
        return coupling
    if kind != "suffix":
        return average
    window = _window(count)
    before = (count + 1 - window + 1) // 2
    return (window * average + before * earlier) / (window + before)


def _window(count: jax.Array) -> jax.Array:
    """Iterates since the last whose number, counted from 1, was a power of two, with that one."""
    iterate = count + 1
    return iterate - (1 << (31 - jax.lax.clz(iterate))) + 1
