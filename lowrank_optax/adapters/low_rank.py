"""Adapters whose change is a product of two thin factors: nearly all.

All that such a method has to say is which two factors its parameters make.
"""

import abc
import dataclasses
from typing import Any

import jax
from jax.nn import initializers
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.adapters.base import Adapter, Arrays, product
from lowrank_optax.adapters.operands import Operand, Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Adapter):
    """A method whose change is a product of two thin factors: ``y + (drop(x) A) B``.

    No matrix of the weight's shape is formed, forward or backward. Factors are formed in float32
    from the parameters once a call, and cast to the activations' dtype. What is trained should go
    into the second: its gradient needs the ``r`` numbers ``x A`` of each token, that of the first
    the whole input.

    Attributes:
      rank: The rank, or (for a stack) one for each layer: arrays are then padded to the largest,
        and what is beyond a layer's own rank has no part in anything.
      alpha: The change is scaled by ``alpha / rank``; None for ``alpha = rank``.
      dropout: The fraction of inputs dropped before the first factor, in training.
      param_dtype: Of the adapter's arrays.
    """

    rank: int | tuple[int, ...] = 8
    alpha: float | None = None
    dropout: float = 0.0
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Checks the options, each where it is given.

        Raises:
          TypeError: If ``rank`` is no int or tuple of them.
          ValueError: If one is out of its range.
        """
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        if not all(isinstance(r, int) and not isinstance(r, bool) for r in ranks) or not ranks:
            raise TypeError(f"rank={self.rank!r} must be an int, or a tuple of one for each layer.")
        if min(ranks) < 1:
            raise ValueError(f"rank={self.rank!r} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and below 1.")

    @abc.abstractmethod
    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """The factors ``[..., d_in, r]`` and ``[..., r, d_out]`` of one layer's change, scaled."""

    def taken(self, p: Arrays) -> tuple[jax.Array, jax.Array] | None:
        """Factors of what one layer's weight was changed by when it was attached to; None if not.

        The weight is less by their product, which was that of `factors` then.
        """
        del p
        return None

    def before(self, p: Arrays, x: Operand, y: jax.Array) -> jax.Array:
        """The output with what was taken from the weight; see `Adapter.before`."""
        taken = self.taken(p)
        return y if taken is None else y + thin_product(x, *taken).astype(y.dtype)

    def original(self, p: Arrays, base: jax.Array) -> jax.Array:
        """The weight with what was taken from it, to the rounding of its dtype."""
        taken = self.taken(p)
        if taken is None:
            return base
        return (base.astype(jnp.float32) + product(*taken)).astype(base.dtype)

    @property
    def max_rank(self) -> int:
        """The number of columns of the first factor."""
        return max(self.rank) if isinstance(self.rank, tuple) else self.rank

    def scale_of(self, rank: int) -> float:
        """The scale of a layer of that rank."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def rank_scales(self, layers: int) -> dict[str, jax.Array]:
        """``rank_scale [L, r]``, the scale within a layer's rank and zero beyond; {} if all equal.

        Raises:
          ValueError: If there are other than ``layers`` ranks.
        """
        if not isinstance(self.rank, tuple):
            return {}
        if len(self.rank) != layers:
            raise ValueError(
                f"rank={self.rank} has {len(self.rank)} ranks for a stack of {layers} weights: "
                "give one for each, or an int."
            )
        ranks = jnp.array(self.rank)[:, None]
        scales = jnp.array([self.scale_of(r) for r in self.rank], jnp.float32)[:, None]
        return {"rank_scale": jnp.where(jnp.arange(self.max_rank) < ranks, scales, 0.0)}

    def layer_ranks(self) -> jax.Array:
        """The rank of each layer, int32 ``[L]``, or ``[1]`` of all."""
        return jnp.array(self.rank if isinstance(self.rank, tuple) else (self.rank,))

    def within_ranks(self) -> jax.Array:
        """Which of ``max_rank`` directions a layer has, bool ``[L, r]`` or ``[1, r]``.

        Beyond it factors start at zero, and stay there: no gradient moves them.
        """
        return jnp.arange(self.max_rank) < self.layer_ranks()[:, None]

    def scaled(self, p: Arrays, factor: jax.Array) -> jax.Array:
        """The second factor ``[..., r, d_out]`` times the scale of each row; float32."""
        factor = factor.astype(jnp.float32)
        if "rank_scale" in p:
            return p["rank_scale"][..., :, None] * factor
        scale = self.scale_of(self.max_rank)
        return factor if scale == 1 else scale * factor

    def apply(
        self,
        p: Arrays,
        x: Operand,
        y: jax.Array,
        *,
        weight: jax.Array,
        bias: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """``y + (drop(x) A) B``; see `Adapter.apply`."""
        del weight, bias
        return y + self.branch(p, x, key).astype(y.dtype)

    def branch(self, p: Arrays, x: Operand, key: jax.Array | None = None) -> jax.Array:
        """What is added to the layer's output, ``[..., d_out]``."""
        first, second = self.factors(p)
        return thin_product(self.dropped(x, key), first, second)

    def dropped(self, x: Operand, key: jax.Array | None) -> Operand:
        """The branch's input: some of it is dropped in training."""
        return x if key is None or self.dropout == 0 else x.drop(key, self.dropout)

    def delta(self, p: Arrays, weight: jax.Array) -> jax.Array:
        """The product of the factors; see `Adapter.delta`."""
        del weight
        return product(*self.factors(p))

    def to_lora(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """The factors themselves, scaled; see `Adapter.to_lora`."""
        return self.factors(p)


def thin_product(x: Operand, first: jax.Array, second: jax.Array) -> jax.Array:
    """``(x A) B`` in the dtype of ``x``'s products."""
    inside = x @ first
    return Rows(inside) @ second


def kaiming_uniform(gain_squared: float = 1 / 3) -> initializers.Initializer:
    """U(-b, b) with ``b² = 3 gain_squared / fan_in``, for ``[*batch, fan_in, fan_out]``.

    The default is PyTorch's ``kaiming_uniform_`` with ``a = sqrt(5)``: ``b = 1 / sqrt(fan_in)``,
    LoRA's and PEFT's; 2 is ``a = 0``, He's, which Flax and AFLoRA take: ``b = sqrt(6 / fan_in)``.
    """
    return initializers.variance_scaling(
        gain_squared, "fan_in", "uniform", in_axis=-2, out_axis=-1, batch_axis=()
    )


def for_each(
    initialiser: Any, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    """An array ``[L, ...]`` whose layers are drawn with keys of their own."""
    keys = jax.random.split(key, shape[0])
    return jax.vmap(lambda k: initialiser(k, shape[1:], jnp.dtype(dtype)))(keys)
