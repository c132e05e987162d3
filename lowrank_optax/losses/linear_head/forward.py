"""The loss by chunks of tokens, whose gradients are made while the chunk's logits are there.

The logits of a chunk of tokens for all words give the loss and its gradient at once, and the
backward pass only multiplies by the cotangent. So the gradient must be known up to one factor
beforehand: for one loss of all tokens or, where nothing but the hidden states is differentiated,
for one loss of each token.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from lowrank_optax.losses.linear_head.chunking import ChunkPlan, choose_plan, sizes_of
from lowrank_optax.losses.linear_head.plain import LossOptions, sums_of_logits, token_loss
from lowrank_optax.losses.linear_head.recompute import (
    Saved,
    chunked_sums,
    flags,
    from_flags,
    primal,
    recomputed_gradients,
)
from lowrank_optax.losses.linear_head.tiles import (
    Head,
    Operands,
    Words,
    for_chunks,
    full,
    gradient_dtype,
    head_product,
    hidden_product,
    logit_gradient,
    logits_of,
    put,
    sum_dtype,
    take,
    take_tokens,
    vocabulary,
    zeros_if,
)


def loss_and_gradients(
    head: Head,
    options: LossOptions,
    operands: Operands,
    words: Words,
    weights: jax.Array,
    wanted: Operands,
) -> tuple[jax.Array, Operands]:
    """The loss ℓ_t of each token, and the gradients of Σ w_t·ℓ_t.

    Args:
      head: Static facts of the logits.
      options: Options of the loss.
      operands: What logits are made of.
      words: The labels.
      weights: Weights w [T].
      wanted: A bool for each operand: whether its gradient is wanted.

    Returns:
      ℓ [T], and the gradients, None where they are not wanted: by the hidden states in their
      dtype, by heads and bias in float32 if there are several chunks of tokens, else in theirs;
      float32 instead of float16.
    """
    dtype, like = sum_dtype(operands), (operands, words, weights)
    # The backward pass may multiply by a loss scale, without which float16 has not the exponents.
    half = any(x.dtype == jnp.float16 for x in jax.tree.leaves(operands))
    to = dtype if half or len(words.labels) > head.tokens else None
    empty = lambda wants, x: zeros_if(wants, x, to, like)
    rows = lambda wants, x: zeros_if(wants, x, gradient_dtype(operands), like)
    losses = full(words.labels.shape, 0, dtype, like)
    gradients = Operands(
        tuple(map(rows, wanted.hidden, operands.hidden)),
        tuple(map(empty, wanted.heads, operands.heads)),
        empty(wanted.bias, operands.bias),
    )

    def tokens(start: Any, size: int, carry: Any) -> Any:
        losses, so_far = carry
        part = take_tokens(operands, start, size)
        labels = words._replace(labels=take(words.labels, start, size))
        a = logits_of(head, part)
        sums = sums_of_logits(head, a, labels)
        loss, pull = jax.vjp(partial(token_loss, options), sums)
        (cotangents,) = pull(take(weights, start, size).astype(loss.dtype))
        g = logit_gradient(head, a, labels, 0, sums, cotangents)
        bias = so_far.bias
        if bias is not None:
            bias = bias + jnp.sum(g, axis=0).astype(bias.dtype)
        g = g.astype(gradient_dtype(operands))
        hidden = tuple(
            None if x is None else put(x, hidden_product(g, w, axis, dtype), start)
            for x, w, axis in zip(so_far.hidden, operands.heads, head.axes, strict=True)
        )
        heads = tuple(
            None if x is None else _add_head_product(head, x, g, h, axis)
            for x, h, axis in zip(so_far.heads, part.hidden, head.axes, strict=True)
        )
        return put(losses, loss, start), Operands(hidden, heads, bias)

    return for_chunks(len(words.labels), head.tokens, tokens, (losses, gradients))


def _add_head_product(
    head: Head, total: jax.Array, g: jax.Array, h: jax.Array, axis: int
) -> jax.Array:
    """The gradient of a head added up chunk by chunk, so that no second one of its size is made."""

    def words(start: Any, size: int, total: jax.Array) -> jax.Array:
        part = head_product(
            take(g, start, size, 1), h, axis, jnp.promote_types(total.dtype, jnp.float32)
        )
        return put(total, take(total, start, size, 1 - axis) + part, start, 1 - axis)

    return for_chunks(g.shape[1], head.words, words, total)


@dataclasses.dataclass(frozen=True)
class WeightedLoss:
    """Static facts of `weighted_loss`.

    Attributes:
      head: Facts of the logits; the plan replaces its chunks.
      options: Options of the loss.
      per_token: Whether there is a loss for each token, not their sum.
      design: As for `linear_cross_entropy`.
      chunk_bytes: As for `linear_cross_entropy`.
    """

    head: Head
    options: LossOptions
    per_token: bool
    design: str
    chunk_bytes: int | None

    def reduce(self, weighted: jax.Array) -> jax.Array:
        """The losses, or their sum."""
        return weighted if self.per_token else jnp.sum(weighted)

    def planned(self, operands: Operands, wanted: Operands | None) -> tuple[ChunkPlan, Head]:
        """The plan where these gradients are wanted, or no gradient at all."""
        design, trained, summed = "recompute", [False] * len(operands.heads), False
        if wanted is not None:
            design, trained = self.design, wanted.heads
            summed = any([*wanted.heads, wanted.bias])
        if design == "forward" and self.per_token and summed:
            raise ValueError(
                "design='forward' makes gradients before it knows the factor of each token's loss: "
                "reduction='none' has no gradient by a head, bias or LoRA then. Take "
                "design='recompute', or a reduction."
            )
        one_factor = not (self.per_token and summed)
        sizes = sizes_of(operands.hidden, operands.heads, vocabulary(self.head, operands), trained)
        plan = choose_plan(sizes, design, self.chunk_bytes, one_factor)
        return plan, dataclasses.replace(self.head, words=plan.words, tokens=plan.tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_loss(
    call: WeightedLoss, operands: Operands, words: Words, weights: jax.Array
) -> jax.Array:
    """Σ_t w_t·ℓ_t, or [w_t·ℓ_t], whose design is chosen when it is known what is differentiated."""
    _, head = call.planned(operands, None)
    losses = token_loss(call.options, chunked_sums(head, operands, words))
    return call.reduce(losses * weights)


def _forward(call: WeightedLoss, operands: Any, words: Any, weights: Any) -> Any:
    flagged = flags(operands)
    wanted = from_flags(flagged)
    operands, words, weights = primal((operands, words, weights))
    plan, head = call.planned(operands, wanted)
    # What is saved has the same structure whatever is differentiated, see `flags`: empty arrays
    # stand for what the design does not save.
    empty = lambda tree: jax.tree.map(lambda x: jnp.zeros(0, x.dtype), tree)
    is_made = plan.design == "forward"
    if is_made:
        losses, made = loss_and_gradients(head, call.options, operands, words, weights, wanted)
        gradients = jax.tree.map(lambda x, g: empty(x) if g is None else g, operands, made)
        sums = empty(jax.eval_shape(partial(chunked_sums, head), operands, words))
        operands = empty(operands)
    else:
        sums = chunked_sums(head, operands, words)
        losses = token_loss(call.options, sums)
        gradients = empty(operands)
    saved = operands, words, weights, sums, losses, gradients, flagged, jnp.zeros(is_made)
    return call.reduce(losses * weights), saved


def _backward(call: WeightedLoss, residuals: Any, cotangent: Any) -> Any:
    operands, words, weights, sums, losses, gradients, flagged, is_made = residuals
    if isinstance(cotangent, SymbolicZero):
        return None, None, None
    wanted = from_flags(flagged)
    if is_made.size:
        rows = cotangent[:, None] if call.per_token else cotangent

        def scaled(factor: jax.Array) -> Any:
            return lambda wants, x, like: (x * factor).astype(like.dtype) if wants else None

        result = Operands(
            tuple(map(scaled(rows), wanted.hidden, gradients.hidden, operands.hidden)),
            tuple(map(scaled(cotangent), wanted.heads, gradients.heads, operands.heads)),
            scaled(cotangent)(wanted.bias, gradients.bias, operands.bias),
        )
    else:
        _, head = call.planned(operands, wanted)
        _, pull = jax.vjp(partial(token_loss, call.options), sums)
        saved = Saved(words, sums, *pull((cotangent * weights).astype(losses.dtype)))
        result = recomputed_gradients(head, operands, saved, wanted)
    return result, None, (cotangent * losses).astype(weights.dtype)


weighted_loss.defvjp(_forward, _backward, symbolic_zeros=True)
