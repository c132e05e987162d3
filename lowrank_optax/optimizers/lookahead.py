"""Where an extrapolation takes its gradients: a step along the last gradient, or along noise."""

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
from lowrank_optax.states.precision import widened

NamedDirection = Literal["gradient", "normalized"]
Direction: TypeAlias = NamedDirection | Callable[[Any], Any]
Distribution = Literal["normal", "uniform"]


def check_direction(
    direction: Direction, max_norm: jax.typing.ArrayLike | None, rate: optax.ScalarOrSchedule
) -> None:
    """Raises ValueError where an argument is out of range."""
    if isinstance(rate, int | float) and not rate >= 0:
        raise ValueError(
            f"inner_learning_rate={rate} must be 0 or positive: the step back to the point where "
            "gradients are taken."
        )
    if not callable(direction) and direction not in get_args(NamedDirection):
        raise ValueError(
            f"direction={direction!r} must be 'gradient', 'normalized' or a function of the "
            "gradients."
        )
    if isinstance(max_norm, int | float) and not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive, or None for no bound.")


def direction_of(
    gradient: Any,
    direction: Direction,
    max_norm: jax.typing.ArrayLike | None,
    rule: DimensionNumbersRule,
) -> Any:
    """The direction of the step for a gradient, in float32 at least.

    Args:
      gradient: Tree of gradients.
      direction: The gradient itself, that of each weight scaled to a root mean square of 1, or a
        function of the tree of gradients.
      max_norm: Largest norm of the direction, over all leaves; None for no bound.
      rule: Which leaves are stacked weights.
    """
    found = widened(gradient)
    if callable(direction):
        found = direction(found)
    elif direction == "normalized":
        found = _each(_with_unit_mean_square, found, rule)
    if max_norm is None:
        return found
    return optax.clip_by_global_norm(max_norm).update(found, optax.EmptyState())[0]


def noise_like(
    params: Any,
    key: jax.Array,
    distribution: Distribution,
    filter_normalized: bool,
    rule: DimensionNumbersRule,
) -> Any:
    """Noise of mean 0 and variance 1 in the parameters' shapes, in float32 at least.

    Args:
      params: The parameters.
      key: PRNG key.
      distribution: Distribution of each number.
      filter_normalized: Whether to multiply it by the norm of its column of the weight.
      rule: Which axes are the columns.
    """
    half = 3.0**0.5  # of an interval of variance 1
    uniform = functools.partial(jax.random.uniform, minval=-half, maxval=half)
    sampler = jax.random.normal if distribution == "normal" else uniform
    params = widened(params)
    drawn = optax.tree.random_like(key, params, sampler)
    if not filter_normalized:
        return drawn
    return jax.tree.map(jnp.multiply, drawn, _each(_column_norms, params, rule))


def step_back(params: Any, rate: jax.typing.ArrayLike, direction: Any) -> Any:
    """``params - rate * direction``, rounded once to the parameters' dtype."""
    point = lambda w, zeta: (widened(w) - rate * zeta).astype(w.dtype)
    return jax.tree.map(point, params, direction)


def zero_unless_finite(gradient: Any) -> Any:
    """The tree, or zeros if its norm, and so any of its numbers, is not finite."""
    keep = jnp.isfinite(optax.tree.norm(widened(gradient)))
    return jax.tree.map(lambda g: jnp.where(keep, g, jnp.zeros_like(g)), gradient)


def _each(
    function: Callable[[jax.Array, bool], jax.Array], tree: Any, rule: DimensionNumbersRule
) -> Any:
    """``function(x, is_matrix)`` of every leaf; matrices are ``[*batch, rows, columns]`` for it."""
    leaves, treedef = jax.tree.flatten(tree)
    specs = resolve_dimension_numbers(rule, tree)

    def one(x: jax.Array, spec: WeightDimensionNumbers | None) -> jax.Array:
        if spec is None:
            return function(x, False)
        return from_matrix(function(to_matrix(x, spec), True), spec, x)

    return treedef.unflatten([one(x, spec) for x, spec in zip(leaves, specs, strict=True)])


def _with_unit_mean_square(g: jax.Array, is_matrix: bool) -> jax.Array:
    """Scales each of stacked layers by itself."""
    axes = (-2, -1) if is_matrix else None
    size = jnp.sqrt(jnp.mean(jnp.square(g), axes, keepdims=True))
    return jnp.where(size > 0, g / jnp.where(size > 0, size, 1), 0)


def _column_norms(w: jax.Array, is_matrix: bool) -> jax.Array:
    """The norm of each number's column; the last axis of other leaves counts columns, too."""
    axes = -2 if is_matrix else tuple(range(w.ndim - 1))
    return jnp.broadcast_to(jnp.sqrt(jnp.sum(w**2, axes, keepdims=True)), w.shape)
