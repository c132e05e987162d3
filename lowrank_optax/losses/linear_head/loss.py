"""Cross entropy of a linear head on hidden states, without logits of all tokens and words."""

from collections.abc import Hashable
import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.losses.linear_head.forward import WeightedLoss, weighted_loss
from lowrank_optax.losses.linear_head.plain import (
    LossOptions,
    over_devices,
    plain_token_sums,
    token_loss,
)
from lowrank_optax.losses.linear_head.plan import choose_plan, sizes_of
from lowrank_optax.losses.linear_head.recompute import token_sums
from lowrank_optax.losses.linear_head.tiles import Head, Operands, TokenSums, Words, sum_dtype
from lowrank_optax.matrices.explicit_sharding import vary_like

DESIGNS = ("auto", "recompute", "forward")
REDUCTIONS = ("mean", "sum", "none")


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
      weights: Weights w [...] of the tokens. Their sum is differentiated as a constant.
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
      TypeError: If ``hidden`` is not floating point or ``labels`` are not integers.
      ValueError: If shapes do not fit, an option is out of its range, a label is out of range (in a
        traced function its token's loss is NaN), or the design cannot do what is asked for.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> hidden = jnp.array([[1.0, 2.0], [0.0, -1.0], [3.0, 1.0]])
      >>> head = jnp.array([[1.0, 0.0, -1.0, 0.5], [0.0, 1.0, 1.0, -0.5]])
      >>> labels = jnp.array([1, 0, -100])
      >>> loss, gradient = jax.value_and_grad(lro.losses.linear_cross_entropy)(hidden, head, labels)
      >>> print(f"{loss:.5f}", gradient[0].round(4))
      0.90843 [ 0.0113 -0.1351]

    Reference:
      Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024,
      https://arxiv.org/abs/2411.09009; the design "forward": Hsu et al., Liger Kernel, 2024,
      https://arxiv.org/abs/2410.10989.
    """
    hidden, head, labels = jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(labels)
    _check_options(label_smoothing, z_loss, soft_cap, reduction, chunk_bytes, design, head_axis)
    if design == "forward" and (return_values or vocabulary_axis_name is not None):
        raise ValueError(
            "design='forward' makes the gradient of one loss over all words of one device: with "
            "return_values or vocabulary_axis_name take design='recompute'."
        )
    _check_shapes(hidden, head, labels, bias, lora, weights, head_axis)
    devices = 1 if vocabulary_axis_name is None else jax.lax.axis_size(vocabulary_axis_name)
    width = head.shape[1 - head_axis]
    valid = width * devices if valid_vocabulary is None else valid_vocabulary
    if not 0 < valid <= width * devices:
        raise ValueError(
            f"valid_vocabulary={valid_vocabulary} must be from 1 to {width * devices}, the words "
            "of the head."
        )
    shape, labels = labels.shape, labels.reshape(-1)
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    counted = jnp.ones(labels.shape, bool) if ignore_label is None else labels != ignore_label
    in_range = (labels >= 0) & (labels < valid)
    _check_labels(labels, counted, in_range, valid)

    rows = hidden.reshape(-1, hidden.shape[-1])
    if ignore_label is not None:
        rows = jnp.where(counted[:, None], rows, 0)
    states, heads = (rows,), (head,)
    if lora is not None:
        a, b, scale = lora
        states += ((jnp.asarray(scale, rows.dtype) * (rows @ a.astype(rows.dtype))),)
        heads += (jnp.asarray(b),)
    first = 0
    if vocabulary_axis_name is not None:
        first = (jax.lax.axis_index(vocabulary_axis_name) * width).astype(labels.dtype)
    padded = valid < width * devices
    words = Words(
        jnp.where(in_range, labels - first, -1),
        jnp.asarray(valid - first, labels.dtype) if padded else None,
    )
    operands = Operands(states, heads, None if bias is None else jnp.asarray(bias))
    facts = Head(
        axes=(head_axis, 0)[: len(heads)],
        soft_cap=soft_cap,
        wants_sum=label_smoothing > 0,
        wants_expected=return_values,
    )
    options = LossOptions(label_smoothing, z_loss, valid)

    dtype = sum_dtype(operands)
    shares = counted.astype(dtype)
    if weights is not None:
        shares = jnp.where(counted, jnp.asarray(weights).reshape(-1).astype(dtype), 0)
    over_tokens = lambda x: x if token_axis_name is None else jax.lax.psum(x, token_axis_name)
    if reduction == "mean":
        total = jax.lax.stop_gradient(over_tokens(jnp.sum(shares)))
        shares = shares / jnp.where(total == 0, 1, total)
    # A wrong label that only shows when the program runs must not count as another word.
    shares = jnp.where(counted & ~in_range, jnp.nan, shares)

    by_sums = return_values or vocabulary_axis_name is not None or chunk_bytes == "off"
    # All arguments of a core vary over the same mesh axes; gradients are summed over the others.
    together = (operands, words, None if by_sums else shares)
    operands, words, varying = jax.tree.map(lambda x: vary_like(x, together), together)
    if not by_sums:
        call = WeightedLoss(facts, options, reduction == "none", design, chunk_bytes)
        loss = weighted_loss(call, operands, words, varying)
        return loss.reshape(shape) if reduction == "none" else over_tokens(loss)
    if chunk_bytes == "off":
        sums = plain_token_sums(facts, operands, words)
    else:
        sizes = sizes_of(states, heads, width, [False] * len(heads))
        plan = choose_plan(sizes, "recompute", chunk_bytes, False)
        head_facts = dataclasses.replace(facts, words=plan.words, tokens=plan.tokens)
        sums = token_sums(head_facts, operands, words)
    if vocabulary_axis_name is not None:
        sums = over_devices(sums, vocabulary_axis_name)
    losses = shares * token_loss(options, sums)
    loss = losses.reshape(shape) if reduction == "none" else over_tokens(jnp.sum(losses))
    return (loss, _values(sums, counted, in_range, shape)) if return_values else loss


def _values(sums: TokenSums, counted: Any, in_range: Any, shape: tuple[int, ...]) -> TokenValues:
    log_probability = jnp.where(in_range, sums.label_logit - sums.lse, jnp.nan)
    values = log_probability, sums.lse, sums.lse - sums.expected_logit
    return TokenValues(*(jnp.where(counted, x, 0).reshape(shape) for x in values))


def _check_options(
    label_smoothing: float,
    z_loss: float,
    soft_cap: float | None,
    reduction: str,
    chunk_bytes: Any,
    design: str,
    head_axis: int,
) -> None:
    if design not in DESIGNS:
        raise ValueError(f"design={design!r} must be one of {', '.join(map(repr, DESIGNS))}.")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction={reduction!r} must be one of {', '.join(map(repr, REDUCTIONS))}."
        )
    if head_axis not in (0, 1):
        raise ValueError(f"head_axis={head_axis!r} must be 0 for [D, V] or 1 for [V, D].")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing!r} must be from 0 to 1.")
    if not (z_loss >= 0 and math.isfinite(z_loss)):
        raise ValueError(f"z_loss={z_loss!r} must be finite and not negative.")
    if soft_cap is not None and not (soft_cap > 0 and math.isfinite(soft_cap)):
        raise ValueError(f"soft_cap={soft_cap!r} must be positive, or None for no cap.")
    if chunk_bytes not in (None, "off") and (isinstance(chunk_bytes, str) or chunk_bytes <= 0):
        raise ValueError(
            f"chunk_bytes={chunk_bytes!r} must be a positive number, None for the default budget, "
            "or 'off' for the plain loss."
        )
    if chunk_bytes == "off" and design != "auto":
        raise ValueError(f"chunk_bytes='off' is the plain loss, and design={design!r} is not.")


def _check_shapes(
    hidden: Any, head: Any, labels: Any, bias: Any, lora: Any, weights: Any, head_axis: int
) -> None:
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise TypeError(f"hidden must be floating point, got {hidden.dtype}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}.")
    if hidden.ndim == 0 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {labels.shape} must have the shape of hidden {hidden.shape} without its last "
            "axis."
        )
    if head.ndim != 2 or head.shape[head_axis] != hidden.shape[-1]:
        raise ValueError(
            f"head {head.shape} must have {hidden.shape[-1]} features, as hidden {hidden.shape}, "
            f"on its axis head_axis={head_axis}."
        )
    words = head.shape[1 - head_axis]
    if bias is not None and jnp.shape(bias) != (words,):
        raise ValueError(f"bias {jnp.shape(bias)} must be {(words,)}, for head {head.shape}.")
    if lora is not None:
        a, b = jnp.shape(lora[0]), jnp.shape(lora[1])
        if len(a) != 2 or a[0] != hidden.shape[-1] or b != (a[1], words):
            raise ValueError(
                f"lora must be A [{hidden.shape[-1]}, r], B [r, {words}] and a scale, got A {a} "
                f"and B {b}."
            )
    if weights is not None and jnp.shape(weights) != labels.shape:
        raise ValueError(f"weights {jnp.shape(weights)} must have the labels' shape {labels.shape}")


def _check_labels(labels: Any, counted: Any, in_range: Any, valid: int) -> None:
    wrong = counted & ~in_range
    if isinstance(wrong, jax.core.Tracer) or not wrong.is_fully_addressable:
        return
    if np.any(wrong):
        label = np.asarray(labels)[np.asarray(wrong)][0]
        raise ValueError(f"label {label} is out of range: labels must be from 0 to {valid - 1}.")
