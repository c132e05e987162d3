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
import numpy as np

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
      param_dtype: Dtype of the adapter's arrays: float32 also on a bfloat16 model, where small
        updates are lost to rounding otherwise.

    Raises:
      TypeError: If `rank` is not an int or a tuple of them.
      ValueError: If an option is out of its range.
    """

    rank: int | tuple[int, ...] = 8
    alpha: float | None = None
    dropout: float = 0.0
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Checks the options, each where it is given."""
        check_rank(self.rank, per_layer=True)
        check_dropout(self.dropout)

    @abc.abstractmethod
    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """The factors ``[..., d_in, r]`` and ``[..., r, d_out]`` of one layer's change, scaled."""

    def removed_factors(self, p: Arrays) -> tuple[jax.Array, jax.Array] | None:
        """The factors of what was removed from the weight when this was attached; None by default.

        Their product was that of `factors` then.
        """
        del p
        return None

    def removed(self, p: Arrays, x: Operand) -> jax.Array | None:
        """The output of the removed factors; see `Adapter.removed`."""
        removed = self.removed_factors(p)
        return None if removed is None else thin_product(x, *removed)

    def removed_weight(self, p: Arrays) -> jax.Array | None:
        """The product of the removed factors; see `Adapter.removed_weight`."""
        removed = self.removed_factors(p)
        return None if removed is None else product(*removed)

    @property
    def max_rank(self) -> int:
        """The number of columns of the first factor."""
        return max(self.rank) if isinstance(self.rank, tuple) else self.rank

    def scale_of(self, rank: int) -> float:
        """The scale of a layer of that rank."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def ranks(self, layers: int) -> np.ndarray:
        """The rank of each layer of a stack, ``[layers]``.

        Raises:
          ValueError: If there are other than ``layers`` ranks.
        """
        if isinstance(self.rank, tuple) and len(self.rank) != layers:
            raise ValueError(
                f"rank={self.rank} has {len(self.rank)} ranks for a stack of {layers} weights: "
                "give one for each, or an int."
            )
        return np.broadcast_to(self.rank, (layers,))

    def scales(self, layers: int) -> np.ndarray:
        """The scale of each layer of a stack, float32 ``[layers]``."""
        return np.array([self.scale_of(int(r)) for r in self.ranks(layers)], np.float32)

    def within_ranks(self, layers: int) -> np.ndarray:
        """Which of ``max_rank`` directions a layer has, bool ``[layers, r]``.

        Beyond it factors start at zero, and stay there: no gradient moves them.
        """
        return np.arange(self.max_rank) < self.ranks(layers)[:, None]

    def rank_scales(self, layers: int) -> dict[str, jax.Array]:
        """``rank_scale [L, r]``, the scale within a layer's rank and zero beyond; {} if all equal.

        Raises:
          ValueError: If there are other than ``layers`` ranks.
        """
        if not isinstance(self.rank, tuple):
            return {}
        within, scales = self.within_ranks(layers), self.scales(layers)
        return {"rank_scale": jnp.asarray(np.where(within, scales[:, None], np.float32(0)))}

    def scaled(self, p: Arrays, factor: jax.Array) -> jax.Array:
        """The second factor ``[..., r, d_out]`` times the scale of each row; float32."""
        factor = factor.astype(jnp.float32)
        if "rank_scale" in p:
            return p["rank_scale"][..., :, None] * factor
        scale = self.scale_of(self.max_rank)
        return factor if scale == 1 else scale * factor

    def branch(
        self,
        p: Arrays,
        x: Operand,
        *,
        y: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """``(drop(x) A) B``; see `Adapter.branch`."""
        del y, weight, bias
        return self.times(p, self.dropped(x, key))

    def times(self, p: Arrays, x: Operand) -> jax.Array:
        """``(x A) B [..., d_out]``."""
        return thin_product(x, *self.factors(p))

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


def check_rank(rank: Any, *, name: str = "rank", per_layer: bool = False) -> None:
    """Raises TypeError or ValueError unless this is an int above 0, or a tuple of them."""
    ranks = rank if per_layer and isinstance(rank, tuple) else (rank,)
    if not ranks or not all(isinstance(r, int) and not isinstance(r, bool) for r in ranks):
        also = ", or a tuple of one for each layer" if per_layer else ""
        raise TypeError(f"{name}={rank!r} must be an int{also}.")
    if min(ranks) < 1:
        raise ValueError(f"{name}={rank!r} must be at least 1.")


def check_dropout(dropout: float) -> None:
    """Raises ValueError unless this is a fraction below 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} must be at least 0 and below 1.")


def thin_product(x: Operand, first: jax.Array, second: jax.Array) -> jax.Array:
    """``(x A) B`` in the dtype of ``x``'s products."""
    return Rows(x @ first) @ second


def difference(
    now: tuple[jax.Array, jax.Array], start: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The factors ``[A - A_0 | A_0]`` and ``[B; B - B_0]`` of ``A B - A_0 B_0``, float32.

    Without a difference of large products: zero before training, and small after a little of it.
    """
    (a, b), (a_0, b_0) = (tuple(x.astype(jnp.float32) for x in pair) for pair in (now, start))
    return jnp.concatenate([a - a_0, a_0], axis=-1), jnp.concatenate([b, b - b_0], axis=-2)


def to_float32(p: Arrays, *names: str) -> tuple[jax.Array, ...]:
    """Arrays by name, converted to float32."""
    return tuple(p[name].astype(jnp.float32) for name in names)


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
