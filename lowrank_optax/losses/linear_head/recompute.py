"""The sums of each token by chunks of words, whose logits the backward pass computes again.

Chunks of words with a running log-sum-exp (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867) give the sums. The backward pass needs no second maximum: with
the saved lse, p = exp(a - lse). The gradient of a chunk of the head is complete when its words are
done, and is rounded and written once.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from lowrank_optax.losses.linear_head.tiles import (
    Head,
    Operands,
    TokenSums,
    Words,
    counts,
    for_chunks,
    full,
    gradient_dtype,
    head_product,
    hidden_product,
    is_label,
    logit_gradient,
    logits_of,
    put,
    sum_dtype,
    take,
    take_tokens,
    take_words,
    vocabulary,
    zeros_if,
)


class Running(NamedTuple):
    """The largest logit of the words so far, and sums relative to it; [T] each."""

    top: jax.Array
    exponentials: jax.Array
    label_logit: jax.Array
    logit_sum: jax.Array | None
    weighted: jax.Array | None


def chunked_sums(head: Head, operands: Operands, words: Words) -> TokenSums:
    """`TokenSums` of all words, in chunks of words and of tokens."""
    count, dtype = len(words.labels), sum_dtype(operands)
    zeros = full((count,), 0, dtype, (operands, words))
    sums = TokenSums(
        zeros, zeros, zeros if head.wants_sum else None, zeros if head.wants_expected else None
    )

    def tokens(start: Any, size: int, sums: TokenSums) -> TokenSums:
        part = words._replace(labels=take(words.labels, start, size))
        done = _sums_of_tokens(head, take_tokens(operands, start, size), part)
        return jax.tree.map(lambda x, chunk: put(x, chunk, start), sums, done)

    return for_chunks(count, head.tokens, tokens, sums)


def _sums_of_tokens(head: Head, operands: Operands, words: Words) -> TokenSums:
    dtype, shape = sum_dtype(operands), words.labels.shape
    constant = lambda x: full(shape, x, dtype, (operands, words))
    zeros = constant(0)
    running = Running(
        constant(-jnp.inf),
        zeros,
        zeros,
        zeros if head.wants_sum else None,
        zeros if head.wants_expected else None,
    )
    step = lambda start, size, running: _add_words(
        head, take_words(head, operands, start, size), words, start, running
    )
    done = for_chunks(vocabulary(head, operands), head.words, step, running)
    expected = done.weighted
    if expected is not None:  # a device may have no word that counts
        expected = expected / jnp.where(done.exponentials == 0, 1, done.exponentials)
    lse = done.top + jnp.log(done.exponentials)
    return TokenSums(done.label_logit, lse, done.logit_sum, expected)


def _add_words(
    head: Head, operands: Operands, words: Words, start: Any, before: Running
) -> Running:
    a = logits_of(head, operands)
    size = a.shape[1]
    counted = counts(words, start, size)
    finite = a
    if counted is not None:
        a, finite = jnp.where(counted, a, -jnp.inf), jnp.where(counted, a, 0)
    top = jnp.maximum(before.top, jnp.max(a, axis=1))
    shift = jnp.where(top == -jnp.inf, 0, top)  # no word counts so far, or a bias of -inf
    e = jnp.exp(a - shift[:, None])
    scale = jnp.exp(before.top - shift)
    label = jnp.where(is_label(words.labels, start, size), finite, 0)
    weighted = logit_sum = None
    if before.logit_sum is not None:
        logit_sum = before.logit_sum + jnp.sum(finite, axis=1)
    if before.weighted is not None:
        products = jnp.where(e == 0, 0, e * finite)  # 0 where a bias of -inf rules a word out
        weighted = before.weighted * scale + jnp.sum(products, axis=1)
    return Running(
        top,
        before.exponentials * scale + jnp.sum(e, axis=1),
        before.label_logit + jnp.sum(label, axis=1),
        logit_sum,
        weighted,
    )


class Saved(NamedTuple):
    """What the gradient of the logits needs beside the operands: see `logit_gradient`."""

    words: Words
    sums: TokenSums
    cotangents: TokenSums


def word_chunk_gradients(
    head: Head,
    operands: Operands,
    saved: Saved,
    start: Any,
    size: int,
    hidden: tuple[jax.Array | None, ...],
    wanted: Operands,
) -> Operands:
    """The backward pass of the words ``start`` to ``start + size - 1``.

    The body of the loop over the head: what comes back for the chunk is complete, so that it may
    be written, or handed to an optimizer which then overwrites these words.

    Args:
      head: Static facts.
      operands: All of them.
      saved: Labels, sums of all words, and the sums' cotangents.
      start: The first word.
      size: The number of words.
      hidden: Gradients by the hidden states so far, [T, D_i], or None where they aren't wanted.
      wanted: A bool for each operand: whether its gradient is wanted.

    Returns:
      The gradients, in float32 and None where they aren't wanted: by the hidden states with this
      chunk's share added, by the chunk of each head, in its layout, and by the chunk of the bias.
    """
    dtype, like = sum_dtype(operands), (operands, saved)
    chunk = take_words(head, operands, start, size)
    empty = lambda wants, x: zeros_if(wants, x, dtype, like)
    gradients = Operands(
        hidden, tuple(map(empty, wanted.heads, chunk.heads)), empty(wanted.bias, chunk.bias)
    )

    def tokens(first: Any, count: int, so_far: Operands) -> Operands:
        part = take_tokens(chunk, first, count)
        labels, *rest = jax.tree.map(
            lambda x: take(x, first, count), (saved.words.labels, saved.sums, saved.cotangents)
        )
        words = saved.words._replace(labels=labels)
        g = logit_gradient(head, logits_of(head, part), words, start, *rest)
        bias = None if so_far.bias is None else so_far.bias + jnp.sum(g, axis=0)
        g = g.astype(gradient_dtype(operands))
        heads = tuple(
            None if x is None else x + head_product(g, h, axis, dtype)
            for x, h, axis in zip(so_far.heads, part.hidden, head.axes, strict=True)
        )
        rows = lambda x, w, axis: take(x, first, count) + hidden_product(g, w, axis, dtype)
        hidden = tuple(
            None if x is None else put(x, rows(x, w, axis), first)
            for x, w, axis in zip(so_far.hidden, chunk.heads, head.axes, strict=True)
        )
        return Operands(hidden, heads, bias)

    return for_chunks(len(saved.words.labels), head.tokens, tokens, gradients)


def recomputed_gradients(
    head: Head, operands: Operands, saved: Saved, wanted: Operands
) -> Operands:
    """The gradients by all operands that are wanted, in their dtypes; None for the others."""
    empty = lambda dtype: lambda wants, x: zeros_if(wants, x, dtype, (operands, saved))
    gradients = Operands(
        tuple(map(empty(sum_dtype(operands)), wanted.hidden, operands.hidden)),
        tuple(map(empty(None), wanted.heads, operands.heads)),
        empty(None)(wanted.bias, operands.bias),
    )

    def step(start: Any, size: int, so_far: Operands) -> Operands:
        done = word_chunk_gradients(head, operands, saved, start, size, so_far.hidden, wanted)
        heads = tuple(
            None if x is None else put(x, part, start, 1 - axis)
            for x, part, axis in zip(so_far.heads, done.heads, head.axes, strict=True)
        )
        bias = None if so_far.bias is None else put(so_far.bias, done.bias, start)
        return Operands(done.hidden, heads, bias)

    done = for_chunks(vocabulary(head, operands), head.words, step, gradients)
    cast = lambda x, like: None if x is None else x.astype(like.dtype)
    return done._replace(hidden=tuple(map(cast, done.hidden, operands.hidden)))


def primal(tree: Any) -> Any:
    """The values of what a forward rule with symbolic zeros is given."""
    return jax.tree.map(lambda x: x.value, tree, is_leaf=_is_primal)


def flags(operands: Any) -> Operands:
    """Which operands are differentiated, each as an array: one element if it is, else empty.

    Calls of one compiled function share the structure of what they save, but may differentiate by
    other arguments. So this is in the shapes.
    """
    flag = lambda x: jnp.zeros(1 if x.perturbed else 0, bool)
    return jax.tree.map(flag, operands, is_leaf=_is_primal)


def from_flags(operands: Operands) -> Operands:
    """The bools that `flags` was made of."""
    return jax.tree.map(lambda x: x.size > 0, operands)


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_sums(head: Head, operands: Operands, words: Words) -> TokenSums:
    """`chunked_sums` with a backward pass in the same chunks.

    Any cotangents of the sums may come. No product is computed that nobody asks for, and nothing of
    the size of a head that isn't differentiated: which are is known when the function is traced.
    """
    return chunked_sums(head, operands, words)


def _forward(head: Head, operands: Any, words: Any) -> Any:
    values = primal(operands), primal(words)
    sums = chunked_sums(head, *values)
    return sums, (*values, sums, flags(operands))


def _backward(head: Head, residuals: Any, cotangents: TokenSums) -> Any:
    operands, words, sums, wanted = residuals
    zero = lambda x: x is None or isinstance(x, SymbolicZero)
    if all(map(zero, cotangents)):
        return None, None
    zeros = jnp.zeros_like(sums.lse)
    needed = (zeros if zero(x) else x for x in cotangents[:2])
    optional = (None if zero(x) else x for x in cotangents[2:])
    saved = Saved(words, sums, TokenSums(*needed, *optional))
    return recomputed_gradients(head, operands, saved, from_flags(wanted)), None


token_sums.defvjp(_forward, _backward, symbolic_zeros=True)
