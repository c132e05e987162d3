"""Statistics of a forward pass that arrive as the gradient of an array of their own.

What FlyLoRA's balance and PRILoRA's pruning need to know of the tokens of a step is delivered where
gradients are: so it is summed over micro-batches and devices as they are, counted once under
rematerialization, absent in evaluation, and the same in every host. Flax does likewise for the
scales of its float8 layers.
"""

import math

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.operands import Operand


@jax.custom_vjp
def with_statistic(out: jax.Array, z: jax.Array) -> jax.Array:
    """``out [..., d]`` itself; the cotangent of ``z [..., 1]`` becomes the weight of each token.

    A token weighs ``1 / tokens``, or 0 if the loss does not depend on its ``out``: padding. With
    ``z = rows @ slot`` for ``slot [k, 1]``, the gradient of ``slot`` is therefore the mean of
    ``rows [..., k]`` over tokens, whatever the loss is.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> rows, out = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.ones((2, 3))
      >>> loss = lambda slot: 5 * with_statistic(out, rows @ slot).sum()
      >>> print(jax.grad(loss)(jnp.zeros((2, 1))).T)
      [[1.  0.5]]
    """
    del z
    return out


def with_mean_squares(out: jax.Array, x: Operand, slot: jax.Array) -> jax.Array:
    """``out [..., d]`` itself; the gradient of ``slot [d_in, 1]`` is the mean square of ``x``.

    The mean is over tokens, as in `with_statistic`. Squares are not saved for the backward pass.

    Args:
      out: What is computed of ``x``, with a row for each token.
      x: The layer's input.
      slot: Float32, for each feature of ``x``.
    """
    z = jax.checkpoint(lambda slot: (x.squared() @ slot).astype(jnp.float32))(slot)
    return with_statistic(out, z)


def _forward(out: jax.Array, z: jax.Array) -> tuple[jax.Array, None]:
    if z.shape != (*out.shape[:-1], 1):
        raise ValueError(f"z must be {(*out.shape[:-1], 1)} for out {out.shape}, got {z.shape}.")
    return out, None


def _backward(_: None, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    counted = jnp.any(g != 0, axis=-1, keepdims=True)
    return g, counted.astype(jnp.float32) / max(math.prod(g.shape[:-1]), 1)


with_statistic.defvjp(_forward, _backward)
