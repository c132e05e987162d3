"""The same numbers from the whole logits: the reference, and all that follows from the numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.losses.linear_head.tiles import (
    Head,
    Operands,
    TokenSums,
    Words,
    counts,
    is_label,
    logits_of,
)


def plain_token_sums(head: Head, operands: Operands, words: Words) -> TokenSums:
    """`TokenSums` from the logits of all tokens and words at once."""
    return sums_of_logits(head, logits_of(head, operands), words)


def sums_of_logits(head: Head, a: jax.Array, words: Words) -> TokenSums:
    """`TokenSums` of logits [T, V]."""
    size = a.shape[1]
    counted = counts(words, 0, size)
    finite = a if counted is None else jnp.where(counted, a, 0)
    lse = jax.nn.logsumexp(a, axis=1, where=counted)
    expected = None
    if head.wants_expected:
        # A word that does not count or has the logit -inf adds 1 * 0, not inf * 0 or 0 * -inf.
        adds = a != -jnp.inf if counted is None else counted & (a != -jnp.inf)
        p = jnp.exp(jnp.where(adds, a - lse[:, None], 0))
        expected = jnp.sum(p * jnp.where(adds, a, 0), axis=1)
    return TokenSums(
        jnp.sum(jnp.where(is_label(words.labels, 0, size), finite, 0), axis=1),
        lse,
        jnp.sum(finite, axis=1) if head.wants_sum else None,
        expected,
    )


def over_devices(sums: TokenSums, axis_name: Any) -> TokenSums:
    """The sums over all words, from those over the words of each device of a mesh axis."""
    top = jax.lax.pmax(jax.lax.stop_gradient(sums.lse), axis_name)
    share = jnp.exp(sums.lse - top)
    total = jax.lax.psum(share, axis_name)
    logit_sum, expected = sums.logit_sum, sums.expected_logit
    return TokenSums(
        jax.lax.psum(sums.label_logit, axis_name),
        top + jnp.log(total),
        None if logit_sum is None else jax.lax.psum(logit_sum, axis_name),
        None if expected is None else jax.lax.psum(share * expected, axis_name) / total,
    )


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """ε, ζ, and the number of words that the smoothed label is spread over."""

    label_smoothing: float
    z_loss: float
    vocabulary: int


def token_loss(options: LossOptions, sums: TokenSums) -> jax.Array:
    """lse - (1 - ε)·a_y - ε·mean(a) + ζ·lse², of each token."""
    loss = sums.lse - (1 - options.label_smoothing) * sums.label_logit
    if sums.logit_sum is not None:
        loss = loss - options.label_smoothing * sums.logit_sum / options.vocabulary
    return loss + options.z_loss * jnp.square(sums.lse) if options.z_loss else loss
