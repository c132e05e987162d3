"""Cross entropy of a linear head on hidden states, without logits of all tokens and words."""

from collections.abc import Hashable
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.losses.linear_head.chunking import check_design, choose_plan, sizes_of
from lowrank_optax.losses.linear_head.forward import WeightedLoss, weighted_loss
from lowrank_optax.losses.linear_head.loss_arguments import (
    check_integers,
    check_labels,
    check_options,
    check_shapes,
    check_sharded,
)
from lowrank_optax.losses.linear_head.plain import (
    LossOptions,
    over_devices,
    plain_token_sums,
    token_loss,
)
from lowrank_optax.losses.linear_head.recompute import token_sums
from lowrank_optax.losses.linear_head.tiles import (
    Head,
    Operands,
    TokenSums,
    Words,
    sum_dtype,
    vocabulary,
)
from lowrank_optax.matrices.explicit_sharding import vary_like


class TokenValues(NamedTuple):
    """Numbers of each token, in the labels' shape; 0 at ignored tokens.

    Attributes:
      log_probability: The log-probability of the label.
      lse: The log-sum-exp of the logits.
      entropy: The entropy of the softmax.
    """

    log_probability: jax.Array
    lse: jax.Array
    entropy: jax.Array


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    lora: tuple[jax.Array, jax.Array, Any] | None = None,
    head_axis: int = 0,
    ignore_label: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    weights: jax.Array | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    valid_vocabulary: int | None = None,
    return_values: bool = False,
    chunk_bytes: int | Literal["off"] | None = None,
    design: Literal["auto", "recompute", "forward"] = "auto",
    vocabulary_axis_name: Hashable | None = None,
    token_axis_name: Hashable | None = None,
) -> Any:
    r"""Compute the cross entropy of ``softmax(hidden @ head)`` in chunks of tokens and words.

    With logits s = h·W + b, a = κ·tanh(s / κ) under a soft cap κ (else a = s), the loss of a token
    with label y and weight w is::

        ℓ = lse(a) - (1 - ε)·a_y - ε·mean(a) + ζ·lse(a)²
        loss = Σ w·ℓ / Σ w

    Products are computed in the dtype of ``hidden`` with float32 sums, and everything else in
    float32. There are two designs, and `chunk_plan` says which one a call takes:

    - ``"recompute"``: the backward pass computes the logits again, 4 products for the plain loss's
      3. The head's gradient is rounded once. Every per-token loss and value has a gradient.
    - ``"forward"``: the forward pass makes the gradients, 3 products. A trained bfloat16 head
      needs a float32 sum of its size. For one loss, or a loss of each token if only ``hidden`` is
      differentiated.

    What is not differentiated is recognised when the function is traced: a frozen head has no
    gradient, nor any array of its size, and costs 2 products in the design ``"forward"``. A loss
    that is not differentiated costs 1.

    The gradient is born projected with ``lora=(P, jnp.zeros((r, V)), 1)``: the gradient by these
    zeros is Pᵀ·dW for the head's gradient dW, which never exists.

    On several devices call it inside `jax.shard_map`. With the head sharded over words name that
    mesh axis ``vocabulary_axis_name``; with tokens sharded name theirs ``token_axis_name``, and
    the loss is that of all tokens. Outside, where the compiler places everything, take
    ``design="recompute"`` with sharded tokens, and do not shard the words.

    Args:
      hidden: [..., D], floating point.
      head: [D, V], or [V, D] with ``head_axis=1``, as a tied embedding is. Converted to the dtype
        of ``hidden`` chunk by chunk.
      labels: Integers [...].
      bias: [V], or None.
      lora: A [D, r], B [r, V] and a scale: the head is W + scale·A·B, which is never formed.
      head_axis: Which axis of ``head`` has the features D: 0 or 1.
      ignore_label: Label of tokens that do not count, whose hidden states may be NaN; None for
        no such label.
      label_smoothing: ε, from 0 to 1.
      z_loss: ζ; 1e-4 in PaLM.
      soft_cap: κ, or None; 30 in Gemma 2.
      weights: Weights w [...] of the tokens. Their sum is differentiated as a constant. Where they
        may cancel, as advantages do, take ``reduction="sum"``.
      reduction: ``"mean"``, Σ w·ℓ / Σ w, and 0 if that sum is 0; ``"sum"``; or ``"none"``, w·ℓ.
      valid_vocabulary: Number of words that count, where the head is padded to more.
      return_values: Whether to return `TokenValues` too, which have gradients.
      chunk_bytes: Budget of a chunk, see `chunk_plan`; ``"off"`` for the plain loss.
      design: ``"recompute"``, ``"forward"``, or ``"auto"``.
      vocabulary_axis_name: Mesh axis over which words are sharded, inside `jax.shard_map`. Labels
        and ``valid_vocabulary`` are of the whole vocabulary.
      token_axis_name: Mesh axis over which tokens are sharded, inside `jax.shard_map`.

    Returns:
      The loss, a float32 scalar, or [...] for ``reduction="none"``; with ``return_values`` a pair
      of it and `TokenValues`.

    Raises:
      TypeError: If labels are not integers, or another array is not floating point.
      ValueError: If shapes do not fit, an option is out of its range, a label is out of range (in a
        traced function its token's loss is NaN), an array is not sharded over its named mesh axis,
        or the design cannot do what is asked for.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> hidden = jnp.array([[1.0, 2.0], [0.0, -1.0], [3.0, 1.0]])
      >>> head = jnp.array([[1.0, 0.0, -1.0, 0.5], [0.0, 1.0, 1.0, -0.5]])
      >>> labels = jnp.array([1, 0, -100])
      >>> loss, gradient = jax.value_and_grad(lro.losses.linear_cross_entropy)(hidden, head, labels)
      >>> print(f"{loss:.4f}, {gradient[0, 0]:.4f}, {gradient[0, 1]:.4f}")
      0.9084, 0.0113, -0.1351

    Reference:
      Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024,
      https://arxiv.org/abs/2411.09009; the design "forward": Hsu et al., Liger Kernel, 2024,
      https://arxiv.org/abs/2410.10989.
    """
    given, labels = labels, jnp.asarray(labels)
    hidden, head = jnp.asarray(hidden), jnp.asarray(head)
    check_design(design, chunk_bytes)
    check_options(label_smoothing, z_loss, soft_cap, reduction)
    check_integers(ignore_label=ignore_label, valid_vocabulary=valid_vocabulary)
    if reduction == "none" and token_axis_name is not None:
        raise ValueError(
            f"token_axis_name={token_axis_name!r} is for one loss of all tokens, and with "
            "reduction='none' each device has the losses of its own: leave token_axis_name out."
        )
    by_sums = return_values or vocabulary_axis_name is not None or chunk_bytes == "off"
    if design == "forward" and by_sums:
        raise ValueError(
            "design='forward' makes the gradient of one loss over all words of one device: with "
            "return_values or vocabulary_axis_name take design='recompute'."
        )
    check_shapes(hidden, head, labels, bias, lora, weights, head_axis)
    check_sharded("vocabulary_axis_name", vocabulary_axis_name, head=head)
    check_sharded("token_axis_name", token_axis_name, hidden=hidden, labels=labels)
    devices = 1 if vocabulary_axis_name is None else jax.lax.axis_size(vocabulary_axis_name)
    width = head.shape[1 - head_axis]
    valid = width * devices if valid_vocabulary is None else valid_vocabulary
    if not 0 < valid <= width * devices:
        raise ValueError(
            f"valid_vocabulary={valid_vocabulary} must be from 1 to {width * devices}, the words "
            "of the head."
        )
    check_labels(given, ignore_label, valid)
    shape, labels = labels.shape, labels.reshape(-1)
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    counted = jnp.ones(labels.shape, bool) if ignore_label is None else labels != ignore_label
    in_range = (labels >= 0) & (labels < valid)

    operands = _operands(hidden, head, bias, lora, None if ignore_label is None else counted)
    words = _words(labels, in_range, valid, width, vocabulary_axis_name)
    facts = Head(
        axes=(head_axis, 0)[: len(operands.heads)],
        soft_cap=soft_cap,
        wants_sum=label_smoothing > 0,
        wants_expected=return_values,
    )
    options = LossOptions(label_smoothing, z_loss, valid)
    over_tokens = lambda x: x if token_axis_name is None else jax.lax.psum(x, token_axis_name)
    shares = counted.astype(sum_dtype(operands))
    if weights is not None:
        shares = jnp.where(counted, jnp.asarray(weights, shares.dtype).reshape(-1), 0)
    if reduction == "mean":
        total = jax.lax.stop_gradient(over_tokens(jnp.sum(shares)))
        shares = jnp.where(total == 0, 0, shares / jnp.where(total == 0, 1, total))
    # A wrong label that only shows when the program runs must not count as another word.
    shares = jnp.where(counted & ~in_range, jnp.nan, shares)

    # All arguments of a core vary over the same mesh axes; gradients are summed over the others.
    together = (operands, words, None if by_sums else shares)
    operands, words, varying = jax.tree.map(lambda x: vary_like(x, together), together)
    if not by_sums:
        call = WeightedLoss(facts, options, reduction == "none", design, chunk_bytes)
        loss = weighted_loss(call, operands, words, varying)
        return loss.reshape(shape) if reduction == "none" else over_tokens(loss)
    sums = _sums(facts, operands, words, chunk_bytes)
    if vocabulary_axis_name is not None:
        sums = over_devices(sums, vocabulary_axis_name)
    losses = shares * token_loss(options, sums)
    loss = losses.reshape(shape) if reduction == "none" else over_tokens(jnp.sum(losses))
    return (loss, _values(sums, counted, in_range, shape)) if return_values else loss


def _operands(hidden: Any, head: Any, bias: Any, lora: Any, counted: Any) -> Operands:
    """The pairs that logits are made of; rows of tokens that don't count are zeros."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    if counted is not None:
        rows = jnp.where(counted[:, None], rows, 0)
    states, heads = [rows], [head]
    if lora is not None:
        a, b, scale = lora
        states.append(jnp.asarray(scale, rows.dtype) * (rows @ jnp.asarray(a, rows.dtype)))
        heads.append(jnp.asarray(b))
    return Operands(tuple(states), tuple(heads), None if bias is None else jnp.asarray(bias))


def _words(labels: Any, in_range: Any, valid: int, width: int, axis_name: Any) -> Words:
    """Labels and the number of words that count, from the first word of this device on."""
    if axis_name is None:
        return Words(jnp.where(in_range, labels, -1), None if valid == width else jnp.array(valid))
    first = (jax.lax.axis_index(axis_name) * width).astype(labels.dtype)
    padded = valid < width * jax.lax.axis_size(axis_name)
    return Words(jnp.where(in_range, labels - first, -1), valid - first if padded else None)


def _sums(facts: Head, operands: Operands, words: Words, chunk_bytes: Any) -> TokenSums:
    if chunk_bytes == "off":
        return plain_token_sums(facts, operands, words)
    frozen = [False] * len(operands.heads)
    sizes = sizes_of(operands.hidden, operands.heads, vocabulary(facts, operands), frozen)
    plan = choose_plan(sizes, "recompute", chunk_bytes, False)
    return token_sums(
        dataclasses.replace(facts, words=plan.words, tokens=plan.tokens), operands, words
    )


def _values(sums: TokenSums, counted: Any, in_range: Any, shape: tuple[int, ...]) -> TokenValues:
    log_probability = jnp.where(in_range, sums.label_logit - sums.lse, jnp.nan)
    values = log_probability, sums.lse, sums.lse - sums.expected_logit
    return TokenValues(*(jnp.where(counted, x, 0).reshape(shape) for x in values))
