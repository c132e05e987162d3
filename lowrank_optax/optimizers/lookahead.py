"""Directions of an extrapolation, made from a gradient or at random."""

from collections.abc import Callable
import functools
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import (
    DimensionNumbersRule,
    WeightDimensionNumbers,
    from_matrix,
    resolve_dimension_numbers,
    to_matrix,
)
from lowrank_optax.states.precision import to_float32

NamedDirection = Literal["gradient", "normalized"]
Direction: TypeAlias = NamedDirection | Callable[[Any], Any]
Distribution = Literal["normal", "uniform"]


def direction_from(
    direction: Direction, max_norm: jax.typing.ArrayLike | None, rule: DimensionNumbersRule
) -> Callable[[Any], Any]:
    """The function from a gradient to its direction, in float32 at least."""
    if not callable(direction) and direction not in get_args(NamedDirection):
        raise ValueError(
            f"direction={direction!r} must be 'gradient', 'normalized' or a function of the "
            "gradients."
        )
    if isinstance(max_norm, int | float) and not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive, or None for no bound.")

    return functools.partial(_direction_of, direction=direction, max_norm=max_norm, rule=rule)


def _direction_of(
    gradient: Any,
    *,
    direction: Direction,
    max_norm: jax.typing.ArrayLike | None,
    rule: DimensionNumbersRule,
) -> Any:
    found = to_float32(gradient)
    if callable(direction):
        found = direction(found)
    elif direction == "normalized":
        found = _each(_with_unit_mean_square, found, rule)
    if max_norm is None:
        return found
    return optax.clip_by_global_norm(max_norm).update(found, optax.EmptyState())[0]


def noise_from(
    distribution: Distribution, filter_normalized: bool, rule: DimensionNumbersRule
) -> Callable[[jax.Array, Any], Any]:
    """The function from a key and parameters to noise in their shapes, in float32 at least.

    Its mean is 0 and its variance 1, before columns are scaled by their norms.
    """
    if distribution not in get_args(Distribution):
        raise ValueError(f"noise={distribution!r} must be 'normal' or 'uniform'.")
    half = 3.0**0.5  # of an interval of variance 1
    uniform = functools.partial(jax.random.uniform, minval=-half, maxval=half)
    sampler = jax.random.normal if distribution == "normal" else uniform
    return functools.partial(
        _noise, sampler=sampler, filter_normalized=filter_normalized, rule=rule
    )


def _noise(
    key: jax.Array,
    params: Any,
    *,
    sampler: Callable[..., jax.Array],
    filter_normalized: bool,
    rule: DimensionNumbersRule,
) -> Any:
    params = to_float32(params)
    drawn = optax.tree.random_like(key, params, sampler)
    if not filter_normalized:
        return drawn
    return jax.tree.map(jnp.multiply, drawn, _each(_column_norms, params, rule))


def check_inner_learning_rate(rate: optax.ScalarOrSchedule) -> None:
    """Refuses a negative number."""
    if isinstance(rate, int | float) and not rate >= 0:
        raise ValueError(
            f"inner_learning_rate={rate} must be 0 or positive: the step back to the point where "
            "gradients are taken."
        )


def _each(
    function: Callable[[jax.Array, bool], jax.Array], tree: Any, rule: DimensionNumbersRule
) -> Any:
    """``function(x, is_matrix)`` of every leaf, with matrices as ``[*batch, rows, columns]``."""
    leaves, treedef = jax.tree.flatten(tree)

    def one(x: jax.Array, spec: WeightDimensionNumbers | None) -> jax.Array:
        if spec is None:
            return function(x, False)
        return from_matrix(function(to_matrix(x, spec), True), spec, x)

    return treedef.unflatten(map(one, leaves, resolve_dimension_numbers(rule, tree)))


def _with_unit_mean_square(g: jax.Array, is_matrix: bool) -> jax.Array:
    """Stacked layers are scaled one by one."""
    axes = (-2, -1) if is_matrix else None
    size = jnp.sqrt(jnp.mean(jnp.square(g), axes, keepdims=True))
    return jnp.where(size > 0, g / jnp.where(size > 0, size, 1), 0)


def _column_norms(w: jax.Array, is_matrix: bool) -> jax.Array:
    """The norm of each number's column; the last axis counts the columns of other leaves."""
    axes = -2 if is_matrix else tuple(range(w.ndim - 1))
    return jnp.broadcast_to(jnp.sqrt(jnp.sum(w**2, axes, keepdims=True)), w.shape)
