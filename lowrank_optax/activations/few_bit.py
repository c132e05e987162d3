"""A function of one number, whose backward pass keeps a few bits of each element."""

from collections.abc import Callable
import functools
from typing import TypeAlias

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from lowrank_optax.activations.packing import PackingName, pack, unpack
from lowrank_optax.activations.step_function import Codebook

CODES = "few_bit_codes"
"""The name of what is kept, for ``jax.checkpoint_policies.save_only_these_names``."""

Pointwise: TypeAlias = Callable[[jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def apply_few_bit(fn: Pointwise, book: Codebook, packing: PackingName, x: jax.Array) -> jax.Array:
    """``fn(x)``, whose backward pass keeps the codes of ``x`` alone.

    Args:
      fn: Elementwise; hashable, closed over no traced array.
      book: What stands in for its derivative.
      packing: Of the codes; see `pack`.
      x: Any shape, floating point.
    """
    return fn(x)


def _forward(
    fn: Pointwise, book: Codebook, packing: PackingName, x: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    packed = pack(book.encode(x), book.bits, packing)
    return fn(x), tuple(checkpoint_name(part, CODES) for part in packed)


def _backward(
    fn: Pointwise,
    book: Codebook,
    packing: PackingName,
    packed: tuple[jax.Array, ...],
    gradient: jax.Array,
) -> tuple[jax.Array]:
    codes = unpack(packed, gradient.shape, book.bits, packing)
    wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    return ((wide * book.decode(codes)).astype(gradient.dtype),)


apply_few_bit.defvjp(_forward, _backward)
