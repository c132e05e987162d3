"""Where an extrapolation looks: the direction made of a gradient, or noise, and a step along it."""

from collections.abc import Callable
import functools
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

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


class Lookahead(NamedTuple):
    """How a gradient becomes a direction.

    Attributes:
      direction: The gradient itself, that of each weight scaled to a root mean square of 1, or a
        function of the tree of gradients.
      max_norm: Largest norm of the direction, over all leaves; None for no bound.
      weight_dimension_numbers: Which leaves are stacked weights: see
        `extrapolated_value_and_grad`.
    """

    direction: Direction
    max_norm: jax.typing.ArrayLike | None
    weight_dimension_numbers: DimensionNumbersRule

    @classmethod
    def checked(
        cls,
        direction: Direction,
        max_norm: jax.typing.ArrayLike | None,
        rule: DimensionNumbersRule,
    ) -> "Lookahead":
        """Raises ValueError where an argument is out of range."""
        if not callable(direction) and direction not in get_args(NamedDirection):
            raise ValueError(
                f"direction={direction!r} must be 'gradient', 'normalized' or a function of the "
                "gradients."
            )
        if isinstance(max_norm, int | float) and not max_norm > 0:
            raise ValueError(f"max_norm={max_norm} must be positive, or None for no bound.")
        return cls(direction, max_norm, rule)

    def __call__(self, gradient: Any) -> Any:
        """The direction, with narrow floats in float32."""
        found = widened(gradient)
        if callable(self.direction):
            found = self.direction(found)
        elif self.direction == "normalized":
            found = _each(_with_unit_mean_square, found, self.weight_dimension_numbers)
        if self.max_norm is None:
            return found
        clip = optax.clip_by_global_norm(self.max_norm)
        return clip.update(found, optax.EmptyState())[0]


class Noise(NamedTuple):
    """Random directions, of mean 0 and variance 1 before they are scaled.

    Attributes:
      distribution: Of each number.
      filter_normalized: Whether each column of a weight has noise in proportion to its norm.
      weight_dimension_numbers: Which axes are the columns: see `extrapolated_value_and_grad`.
    """

    distribution: Distribution
    filter_normalized: bool
    weight_dimension_numbers: DimensionNumbersRule

    @classmethod
    def checked(
        cls, distribution: Distribution, filter_normalized: bool, rule: DimensionNumbersRule
    ) -> "Noise":
        """Raises ValueError if the distribution is unknown."""
        if distribution not in get_args(Distribution):
            raise ValueError(f"noise={distribution!r} must be 'normal' or 'uniform'.")
        return cls(distribution, filter_normalized, rule)

    def __call__(self, key: jax.Array, params: Any) -> Any:
        """Noise in the parameters' shapes, with narrow floats in float32."""
        half = 3.0**0.5  # of an interval of variance 1
        uniform = functools.partial(jax.random.uniform, minval=-half, maxval=half)
        sampler = jax.random.normal if self.distribution == "normal" else uniform
        wide = widened(params)
        drawn = optax.tree.random_like(key, wide, sampler)
        if not self.filter_normalized:
            return drawn
        norms = _each(_column_norms, wide, self.weight_dimension_numbers)
        return jax.tree.map(jnp.multiply, drawn, norms)


def step_back(params: Any, rate: jax.typing.ArrayLike, direction: Any) -> Any:
    """``params - rate * direction``, rounded once to the parameters' dtype."""
    point = lambda w, zeta: (widened(w) - rate * zeta).astype(w.dtype)
    return jax.tree.map(point, params, direction)


def zero_unless_finite(gradient: Any) -> Any:
    """The tree, or zeros in its place if its norm, and so any of its numbers, is not finite."""
    keep = jnp.isfinite(optax.tree.norm(widened(gradient)))
    return jax.tree.map(lambda g: jnp.where(keep, g, jnp.zeros_like(g)), gradient)


def check_inner_learning_rate(rate: optax.ScalarOrSchedule) -> None:
    """Raises ValueError where a rate that is a number is negative."""
    if isinstance(rate, int | float) and not rate >= 0:
        raise ValueError(
            f"inner_learning_rate={rate} must be 0 or positive: the step back to the point where "
            "gradients are taken."
        )


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
    """Layers that are stacked are each scaled by itself."""
    axes = (-2, -1) if is_matrix else None
    size = jnp.sqrt(jnp.mean(jnp.square(g), axes, keepdims=True))
    return jnp.where(size > 0, g / jnp.where(size > 0, size, 1), 0)


def _column_norms(w: jax.Array, is_matrix: bool) -> jax.Array:
    """The norm of each number's column. The last axis of what is no matrix counts columns too."""
    axes = -2 if is_matrix else tuple(range(w.ndim - 1))
    return jnp.broadcast_to(jnp.sqrt(jnp.sum(w**2, axes, keepdims=True)), w.shape)
