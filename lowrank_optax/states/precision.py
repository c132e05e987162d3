"""Arithmetic in float32 around transformations of gradients and parameters of any dtype."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.states.arguments import transformation


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``inner`` run in float32, its state too, whatever the dtype of gradients and parameters.

    Updates are float32: ``optax.apply_updates`` rounds their sum with the parameters once, and
    `round_updates` at random. In bfloat16, by contrast, ``optax.adam`` keeps moments to three
    digits, and a second moment that changes by a thousandth at a step does not change at all.
    Arrays of float64 or integers stay as they are.

    Args:
      inner: Any optax transformation.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
      >>> tx = lro.in_float32(optax.adamw(1e-3))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"].dtype, state[0].mu["kernel"].dtype)
      float32 float32
    """
    inner = transformation("inner", inner)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        return inner.update(to_float32(updates), state, to_float32(params), **extra_args)

    init_fn = lambda params: inner.init(to_float32(params))
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def keep_dtypes(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """``tx`` with updates of the gradients' dtype, also where a traced float32 rate promotes them.

    Under ``optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32)`` it does so in every part
    of optax that multiplies by a hyper-parameter.
    """

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        new, state = tx.update(updates, state, params, **extra_args)
        return optax.tree.cast_like(new, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def to_float32(tree: Any) -> Any:
    """The tree with floats of fewer than 32 bits converted to float32."""
    narrow = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    return jax.tree.map(lambda x: x.astype(jnp.float32) if narrow(x) else x, tree)


def scalar_dtype(tree: Any) -> Any:
    """The dtype of numbers that act on all of a tree: float64 if it has any, else float32."""
    floats = [x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return functools.reduce(jnp.promote_types, floats, jnp.dtype(jnp.float32))


def value_at(
    value: optax.ScalarOrSchedule, count: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    """A number, or the value of a schedule at a step, in float32 or another dtype."""
    return jnp.asarray(value(count) if callable(value) else value, dtype)
