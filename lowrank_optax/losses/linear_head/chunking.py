"""Which design a call takes, and in chunks of what size: by a budget of bytes."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.losses.linear_head.loss_arguments import check_head
from lowrank_optax.storage.fields import is_number

DESIGNS = ("auto", "recompute", "forward")
Design = Literal["plain", "recompute", "forward"]
MIB = 2**20
LEAST_BYTES, MOST_BYTES = 16 * MIB, 1024 * MIB
# Below 512 words a matrix unit is not busy; rows and columns come in tiles of 128.
LANES, FEWEST_WORDS, WORDS_OF_TILE = 128, 512, 2048


class ChunkPlan(NamedTuple):
    """How a call of `linear_cross_entropy` is computed.

    Attributes:
      design: ``"plain"``: all logits at once. ``"recompute"``: the backward pass computes the
        logits again. ``"forward"``: gradients are made in the forward pass.
      words: Words of a chunk. With the design ``"forward"`` logits are of all words, and the
        head's gradient is added up in such chunks.
      tokens: Tokens of a chunk.
      temporary_bytes: Bytes of a chunk's logits and their gradient, and of the float32 sum of
        the head's gradient where the design needs one.
    """

    design: Design
    words: int
    tokens: int
    temporary_bytes: int


class Sizes(NamedTuple):
    """What a plan depends on.

    Attributes:
      tokens: T.
      words: V.
      element_bytes: Bytes of a logit and of its gradient.
      default_bytes: The budget where none is given.
      sum_bytes: Bytes of the float32 sums of trained heads that are of another dtype.
    """

    tokens: int
    words: int
    element_bytes: int
    default_bytes: int
    sum_bytes: int


def sizes_of(hidden: Any, heads: Any, words: int, trained: Any) -> Sizes:
    """The sizes of pairs of hidden states [T, D_i] and heads, some of which are trained."""
    dtype = jnp.dtype(hidden[0].dtype)
    sums = jnp.promote_types(dtype, jnp.float32)
    nbytes = lambda x: x.size * jnp.dtype(x.dtype).itemsize
    default = (nbytes(heads[0]) + nbytes(hidden[0])) // 16
    summed = [w.size for w, t in zip(heads, trained, strict=True) if t and w.dtype != sums]
    return Sizes(
        tokens=hidden[0].shape[0],
        words=words,
        element_bytes=sums.itemsize + dtype.itemsize,
        default_bytes=min(max(default, LEAST_BYTES), MOST_BYTES),
        sum_bytes=sum(summed) * sums.itemsize,
    )


def choose_plan(
    sizes: Sizes, design: str, chunk_bytes: int | str | None, one_factor: bool
) -> ChunkPlan:
    """The plan for these sizes.

    Args:
      sizes: What it depends on.
      design: `ChunkPlan.design`, or ``"auto"``.
      chunk_bytes: The budget; None for the default; ``"off"`` for the plain design.
      one_factor: Whether the gradient is known up to one factor before the backward pass.
    """
    if chunk_bytes == "off":
        nbytes = sizes.element_bytes * sizes.tokens * sizes.words
        return ChunkPlan("plain", sizes.words, sizes.tokens, nbytes)
    budget = sizes.default_bytes if chunk_bytes is None else int(chunk_bytes)
    forward = _forward_plan(sizes, budget)
    if design == "forward" or (
        design == "auto" and one_factor and forward.temporary_bytes <= budget
    ):
        return forward
    return _recompute_plan(sizes, budget)


def check_design(design: str, chunk_bytes: Any) -> None:
    """Raises ValueError if there is no such design or budget."""
    if design not in DESIGNS:
        raise ValueError(f"design={design!r} must be one of {', '.join(map(repr, DESIGNS))}.")
    if chunk_bytes == "off":
        if design != "auto":
            raise ValueError(f"chunk_bytes='off' is the plain loss, and design={design!r} is not.")
    elif chunk_bytes is not None and not (is_number(chunk_bytes) and chunk_bytes > 0):
        raise ValueError(
            f"chunk_bytes={chunk_bytes!r} must be a positive number, None for the default budget, "
            "or 'off' for the plain loss."
        )


def _recompute_plan(sizes: Sizes, budget: int) -> ChunkPlan:
    element = sizes.element_bytes
    tokens = sizes.tokens
    words = _even(sizes.words, budget // (element * max(tokens, 1)))
    if words < min(FEWEST_WORDS, sizes.words):
        words = min(WORDS_OF_TILE, sizes.words)
        tokens = _even(tokens, max(budget // (element * words), LANES))
    return ChunkPlan("recompute", words, tokens, element * words * tokens)


def _forward_plan(sizes: Sizes, budget: int) -> ChunkPlan:
    row = sizes.element_bytes * sizes.words
    tokens, summed = sizes.tokens, 0
    if row * tokens > budget:
        # Several chunks, whose gradients are added up.
        summed = sizes.sum_bytes
        tokens = _even(tokens, max((budget - summed) // row, LANES))
    # With 4096 or more, some shapes make XLA for TPUs copy the whole sum in every step.
    words = _even(sizes.words, WORDS_OF_TILE)
    return ChunkPlan("forward", words, tokens, row * tokens + summed)


def _even(total: int, most: int) -> int:
    """The size of chunks of at most ``most``, about equal, in whole tiles; ``total`` if it fits."""
    if total <= most:
        return total
    most = max(most // LANES * LANES, 1)
    count = math.ceil(total / most)
    return min(math.ceil(total / count / LANES) * LANES, total)


def chunk_plan(
    hidden: Any,
    head: Any,
    *,
    head_axis: int = 0,
    lora: tuple[Any, Any, Any] | None = None,
    head_trained: bool = True,
    one_factor: bool = True,
    chunk_bytes: int | str | None = None,
    design: str = "auto",
) -> ChunkPlan:
    """How `linear_cross_entropy` computes a loss and its gradient for arguments of these shapes.

    The budget is ``chunk_bytes``; by default 1/16 of the bytes of the head and the hidden states,
    and at least 16 MiB and at most 1 GiB. The automatic design is ``"forward"`` if the gradient is
    known up to one factor and if the logits of 128 tokens for all words, and the float32 sum of
    the head's gradient, fit into the budget. A float32 head needs no such sum, nor does a frozen
    one. Otherwise it is ``"recompute"``.

    Args:
      hidden: [..., D], an array or a `jax.ShapeDtypeStruct`.
      head: [D, V], or [V, D] with ``head_axis=1``; likewise.
      head_axis: As for `linear_cross_entropy`.
      lora: As for `linear_cross_entropy`.
      head_trained: Whether the loss is differentiated by the head.
      one_factor: Whether there is one loss: False for ``reduction="none"`` with a head, bias or
        LoRA that is trained, for ``return_values=True`` and with ``vocabulary_axis_name``.
      chunk_bytes: As for `linear_cross_entropy`.
      design: As for `linear_cross_entropy`.

    Returns:
      The design and the sizes of its chunks.

    Raises:
      ValueError: If the head does not fit the hidden states, there is no such design or budget, or
        the design is ``"forward"`` without ``one_factor``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> hidden = jax.ShapeDtypeStruct((8, 256, 2048), jnp.bfloat16)
      >>> head = jax.ShapeDtypeStruct((2048, 32000), jnp.bfloat16)
      >>> lro.losses.chunk_plan(hidden, head)
      ChunkPlan(design='recompute', words=1280, tokens=2048, temporary_bytes=15728640)
      >>> lro.losses.chunk_plan(hidden, head, head_trained=False, chunk_bytes=2**25)
      ChunkPlan(design='forward', words=2048, tokens=128, temporary_bytes=24576000)
    """
    check_design(design, chunk_bytes)
    check_head(hidden, head, head_axis)
    if design == "forward" and not one_factor:
        raise ValueError("design='forward' needs one_factor=True: take design='recompute'.")
    tokens = math.prod(hidden.shape[:-1])
    pairs = [(jax.ShapeDtypeStruct((tokens, hidden.shape[-1]), hidden.dtype), head)]
    if lora is not None:
        rows = jax.ShapeDtypeStruct((tokens, lora[0].shape[1]), hidden.dtype)
        pairs.append((rows, lora[1]))
    states, heads = zip(*pairs, strict=True)
    sizes = sizes_of(states, heads, head.shape[1 - head_axis], [head_trained, True][: len(heads)])
    return choose_plan(sizes, design, chunk_bytes, one_factor)
