"""The learning rate of a step, for parts of a chain that come after it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.states.precision import value_at


def learning_rate_at(
    learning_rate: optax.ScalarOrSchedule | None,
    count: jax.Array,
    extra_args: Mapping[str, Any],
    dtype: Any = jnp.float32,
) -> jax.Array | None:
    """The one given, else that among the extra arguments of ``update``, else None."""
    if learning_rate is None:
        learning_rate = extra_args.get("learning_rate")
    return None if learning_rate is None else value_at(learning_rate, count, dtype)


def check_rate(argument: str, value: Any) -> None:
    """Raises ValueError for a negative number; traced numbers and schedules may be any."""
    if isinstance(value, int | float) and not value >= 0:
        raise ValueError(f"{argument}={value} must be a number ≥ 0 or a schedule.")
