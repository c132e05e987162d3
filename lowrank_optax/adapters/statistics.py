"""Statistics of a forward pass that arrive as the gradient of an array of their own.

What FlyLoRA's balance and PRILoRA's pruning need to know of the tokens of a step is delivered where
gradients are: so it is summed over micro-batches and devices as they are, counted once under
rematerialization, absent in evaluation, and the same in every host. Flax does likewise for the
scales of its float8 layers.

What sums or scales gradients does so to statistics: ``jax.vmap`` over examples, a sum over
micro-batches, the division by a loss scale, clipping. So only ratios of a layer's statistics have a
meaning: FlyLoRA's balance uses signs, and PRILoRA's pruning divides sums of squares by the share of
tokens that count, which arrives in the same way.

A function with a `jax.custom_vjp` has no forward-mode derivative: ``jax.jvp``, ``jax.jacfwd`` and
``jax.hessian`` through such an adapter raise JAX's TypeError.
"""

import math

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.operands import Operand


@jax.custom_vjp
def with_statistic(out: jax.Array, z: jax.Array) -> jax.Array:
    """``out [..., d]`` itself; the cotangent of ``z [..., 1]`` becomes the weight of each token.

    A token weighs ``1 / tokens``, or 0 if the loss does not depend on its ``out``: padding, which
    ``tokens`` counts too. With ``z = rows @ slot`` for ``slot [k, 1]``, the gradient of ``slot`` is
    therefore the mean of ``rows [..., k]`` over tokens, with zeros for padding, whatever the loss
    is. Under ``jax.vmap``, ``tokens`` are those of one example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> rows, out = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.ones((2, 3))
      >>> loss = lambda slot: 5 * with_statistic(out, rows @ slot).sum()
      >>> print(jax.grad(loss)(jnp.zeros((2, 1))).T)
      [[1.  0.5]]
    """
    del z
    return out


def with_mean_squares(
    out: jax.Array, x: Operand, squares: jax.Array, share: jax.Array
) -> jax.Array:
    """``out [..., d]`` itself; the gradients of two slots are the mean squares of ``x``.

    With token weights ``w`` as in `with_statistic`, the gradient of ``squares`` is the sum of
    ``w x²`` and that of ``share`` the sum of ``w``. Their quotient is the mean of ``x²`` over the
    tokens that the loss depends on, however gradients are summed or scaled. Squares are not saved
    for the backward pass.

    Args:
      out: What is computed of ``x``, with a row for each token.
      x: The layer's input.
      squares: ``[*batch, d_in, 1]``, float32.
      share: ``[*batch, 1]``, float32.
    """
    z = jax.checkpoint(lambda slot: (x.squared() @ slot).astype(jnp.float32))(squares)
    return with_statistic(out, z + (share if share.ndim == 1 else share[..., None, :]))


def _forward(out: jax.Array, z: jax.Array) -> tuple[jax.Array, None]:
    if z.shape != (*out.shape[:-1], 1):
        raise ValueError(f"z must be {(*out.shape[:-1], 1)} for out {out.shape}, got {z.shape}.")
    return out, None


def _backward(_: None, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    counted = jnp.any(g != 0, axis=-1, keepdims=True)
    return g, counted.astype(jnp.float32) / max(math.prod(g.shape[:-1]), 1)


with_statistic.defvjp(_forward, _backward)
