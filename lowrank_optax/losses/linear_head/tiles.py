"""A tile: the logits of some tokens for some words, and what is computed from it.

With s = Σ_i h_i·W_i + b, which is one pair (hidden states, head) for a plain head and a second one
(h·A, B) for a LoRA, and a = κ·tanh(s / κ) under a soft cap, the tile has three uses: sums over its
words (`Sums`), the gradient of its logits (`logit_gradient`), and the products of that gradient.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from lowrank_optax.matrices.explicit_sharding import vary_like

T = TypeVar("T")


class Operands(NamedTuple):
    """What logits are made of; or something of each operand: a gradient, or whether it is wanted.

    Attributes:
      hidden: [T, D_i] for each pair, of one dtype, in which products are computed.
      heads: [D_i, V], or [V, D_i] where `Head.axes` says 1, for each pair.
      bias: [V], or None.
    """

    hidden: tuple[Any, ...]
    heads: tuple[Any, ...]
    bias: Any


class Words(NamedTuple):
    """Integers: the label of each token [T], and the number of words that count, or None for all.

    A label that is none of the words (of another device, or out of range) has the logit 0.
    """

    labels: jax.Array
    valid: jax.Array | None


class TokenSums(NamedTuple):
    """Four numbers of each token [T], of which everything else is computed.

    Attributes:
      label_logit: The logit of its label.
      lse: The logarithm of Σ_v exp a_v.
      logit_sum: Σ_v a_v over the words that count; None if not asked for.
      expected_logit: Σ_v p_v·a_v, p the softmax; None if not asked for.
    """

    label_logit: jax.Array
    lse: jax.Array
    logit_sum: Any
    expected_logit: Any


@dataclasses.dataclass(frozen=True)
class Head:
    """Static facts of the logits, and of the chunks they are computed in.

    Attributes:
      axes: For each pair, which axis of its head has the features.
      soft_cap: κ, or None.
      wants_sum: Whether `TokenSums.logit_sum` is asked for.
      wants_expected: Whether `TokenSums.expected_logit` is.
      words: Words of a chunk.
      tokens: Tokens of a chunk.
    """

    axes: tuple[int, ...]
    soft_cap: float | None = None
    wants_sum: bool = False
    wants_expected: bool = False
    words: int = 1
    tokens: int = 1


def vocabulary(head: Head, operands: Operands) -> int:
    """The number of words of these heads."""
    return operands.heads[0].shape[1 - head.axes[0]]


def sum_dtype(operands: Operands) -> Any:
    """The dtype of sums and of all that is computed from logits: float32, or float64."""
    return jnp.promote_types(operands.hidden[0].dtype, jnp.float32)


def full(shape: tuple[int, ...], value: float, dtype: Any, like: Any) -> jax.Array:
    """A constant that varies over the same axes of `jax.shard_map` as the arrays of ``like``."""
    return vary_like(jnp.full(shape, value, dtype), like)


def zeros_if(wanted: bool, x: jax.Array | None, dtype: Any, like: Any) -> jax.Array | None:
    """Zeros of an operand's shape, in its dtype if `dtype` is None; None if not wanted."""
    return full(x.shape, 0, dtype or x.dtype, like) if wanted and x is not None else None


def for_chunks(total: int, size: int, body: Callable[[Any, int, T], T], carry: T) -> T:
    """``carry = body(start, size, carry)`` for each chunk of ``total``, the last one maybe shorter.

    A loop over all full chunks, and the rest after it: nothing is padded, and one chunk is no loop.
    """
    count = total // size if total > size else 0
    if count:
        carry = jax.lax.fori_loop(0, count, lambda i, x: body(i * size, size, x), carry)
    rest = total - count * size
    return body(count * size, rest, carry) if rest else carry


def take(x: jax.Array, start: Any, size: int, axis: int = 0) -> jax.Array:
    """A chunk of an array; the array itself if that is all of it."""
    whole = x.shape[axis] == size
    return x if whole else jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def put(x: jax.Array, chunk: jax.Array, start: Any, axis: int = 0) -> jax.Array:
    """The array with this chunk, in its own dtype, written into it."""
    chunk = chunk.astype(x.dtype)
    whole = x.shape == chunk.shape
    return chunk if whole else jax.lax.dynamic_update_slice_in_dim(x, chunk, start, axis)


def take_words(head: Head, operands: Operands, start: Any, size: int) -> Operands:
    """The same hidden states with a chunk of the words."""
    heads = (take(w, start, size, 1 - a) for w, a in zip(operands.heads, head.axes, strict=True))
    bias = None if operands.bias is None else take(operands.bias, start, size)
    return operands._replace(heads=tuple(heads), bias=bias)


def take_tokens(operands: Operands, start: Any, size: int) -> Operands:
    """The same words with a chunk of the tokens."""
    return operands._replace(hidden=tuple(take(h, start, size) for h in operands.hidden))


def logits_of(head: Head, operands: Operands) -> jax.Array:
    """The logits a [T, V] of these operands."""
    dtype = sum_dtype(operands)
    s = jnp.asarray(0, dtype)
    for h, w, axis in zip(operands.hidden, operands.heads, head.axes, strict=True):
        s = s + _dot(h, w.astype(h.dtype), 1, axis, dtype)
    if operands.bias is not None:
        s = s + operands.bias.astype(dtype)
    return s if head.soft_cap is None else head.soft_cap * jnp.tanh(s / head.soft_cap)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, dtype: Any) -> jax.Array:
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


def is_label(labels: jax.Array, start: Any, size: int) -> jax.Array:
    """[T, size]: whether a word is the token's label. Compared, because a scatter is serial."""
    return labels[:, None] == start + jnp.arange(size, dtype=labels.dtype)


def counts(words: Words, start: Any, size: int) -> jax.Array | None:
    """[size]: which words of a chunk count; None if all do."""
    return None if words.valid is None else start + jnp.arange(size) < words.valid


def logit_gradient(
    head: Head, a: jax.Array, words: Words, start: Any, sums: TokenSums, cotangents: TokenSums
) -> jax.Array:
    """The gradient of the logits of a tile before the soft cap, from the cotangents of all sums."""
    column = lambda x: x[:, None]
    # Where all words of a device have a logit of -inf, p is 0.
    p = jnp.exp(a - column(jnp.where(sums.lse == -jnp.inf, 0, sums.lse)))
    slope = column(cotangents.lse)
    if cotangents.expected_logit is not None:
        centred = 1 + jnp.where(p == 0, 0, a - column(sums.expected_logit))  # a may be -inf
        slope = slope + column(cotangents.expected_logit) * centred
    # The label's 1 is subtracted here, before the gradient is rounded: p may be close to 1.
    g = p * slope
    label = is_label(words.labels, start, a.shape[1])
    g = g + jnp.where(label, column(cotangents.label_logit), 0)
    if cotangents.logit_sum is not None:
        g = g + column(cotangents.logit_sum)
    if head.soft_cap is not None:
        g = g * (1 - jnp.square(a / head.soft_cap))
    counted = counts(words, start, a.shape[1])
    return g if counted is None else jnp.where(counted, g, 0)


def gradient_dtype(operands: Operands) -> Any:
    """The dtype of the gradient of the logits in its products: that of the hidden states.

    float16 has not the exponents for the share of one token in a mean.
    """
    dtype = operands.hidden[0].dtype
    return jnp.float32 if dtype == jnp.float16 else dtype


def hidden_product(g: jax.Array, w: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """The gradient [T, D] of the hidden states of a pair."""
    return _dot(g, w.astype(g.dtype), 1, 1 - axis, dtype)


def head_product(g: jax.Array, h: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """The gradient of the head of a pair, in the head's shape."""
    h = h.astype(g.dtype)
    return _dot(h, g, 0, 0, dtype) if axis == 0 else _dot(g, h, 0, 0, dtype)
