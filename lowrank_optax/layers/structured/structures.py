"""Weights that are products of two cheap factors: LowRank, BlockDense and BlockShuffle.

Wei et al., Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward
Layers, 2024, https://arxiv.org/abs/2406.16450. A weight ``W [N, M]`` is the product of two factors
``V`` and ``U``, and nothing is between them. Factors of stacked weights have leading axes.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.layers.counts import check_count
from lowrank_optax.layers.structured.base import (
    Product,
    Shapes,
    Structure,
    check_divides,
    check_rank,
)
from lowrank_optax.layers.structured.factors import (
    Factors,
    block_shuffle_factors,
    cast,
    in_float32,
    low_rank_factors,
    product,
)


@dataclasses.dataclass(frozen=True)
class LowRank(Structure):
    """The structure ``V U`` with ``V [N, rank]`` and ``U [rank, M]``.

    Args:
      rank: Number of columns of ``V``. It saves parameters below ``N M / (N + M)``.

    Raises:
      ValueError: If ``rank`` is not a positive integer; where it meets a weight, if it is above one
        of the sides or saves no parameter.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> structure = lro.layers.LowRank(rank=2)
      >>> factors = structure.init(jax.random.key(0), 8, 16)
      >>> factors.first.shape, factors.second.shape, structure.compose(factors).shape
      ((8, 2), (2, 16), (8, 16))

    Reference:
      Wei et al., 2024, https://arxiv.org/abs/2406.16450, section 2.
    """

    rank: int

    equations: ClassVar[tuple[str | None, str | None]] = (None, None)

    def __post_init__(self) -> None:
        check_count("rank", self.rank)

    def shapes(self, in_features: int, out_features: int) -> Shapes:
        """``[N, rank]`` and ``[rank, M]``; see `Structure.shapes`."""
        check_rank(self.rank, in_features, out_features)
        if self.rank * (in_features + out_features) >= in_features * out_features:
            most = in_features * out_features / (in_features + out_features)
            raise ValueError(
                f"rank={self.rank} saves no parameter of a weight {in_features} × {out_features}: "
                f"it must be below {most:g}."
            )
        return (in_features, self.rank), (self.rank, out_features)

    def init(
        self,
        key: jax.Array,
        in_features: int,
        out_features: int,
        *,
        initializer_range: float = 0.02,
        dtype: DTypeLike = jnp.float32,
    ) -> Factors:
        """The factors nearest to a normal matrix; see `Structure.init`."""
        self.shapes(in_features, out_features)
        wide = jnp.promote_types(dtype, jnp.float32)
        dense = initializer_range * jax.random.normal(key, (in_features, out_features), wide)
        return cast(self.project(dense), dtype)

    def through(self, rows: jax.Array, first: Product, second: Product) -> jax.Array:
        """See `Structure.through`."""
        return second(first(rows))

    def compose(self, factors: Factors) -> jax.Array:
        """See `Structure.compose`."""
        return product("...nr,...rm->...nm", *map(in_float32, factors))

    def project(self, weight: jax.Array) -> Factors:
        """The truncated SVD; see `Structure.project`."""
        self.shapes(*weight.shape[-2:])
        return low_rank_factors(weight, self.rank)


@dataclasses.dataclass(frozen=True)
class BlockDense(Structure):
    """The structure ``V U`` with ``V`` block-diagonal: ``[blocks, N/blocks, rank/blocks]``.

    ``U [rank, M]`` is dense.

    Args:
      rank: Rows of ``U``, and columns of all blocks of ``V`` together. It saves parameters below
        ``N M / (M + N / blocks)``.
      blocks: Number of blocks of ``V``. It divides ``N`` and ``rank``.

    Raises:
      ValueError: If one is not a positive integer, or ``blocks`` does not divide ``rank``; where
        the structure meets a weight, if ``blocks`` does not divide ``N``, or the rank is above one
        of the sides.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> structure = lro.layers.BlockDense(rank=4, blocks=2)
      >>> factors = structure.init(jax.random.key(0), 8, 16)
      >>> factors.first.shape, factors.second.shape
      ((2, 4, 2), (4, 16))

    Reference:
      Wei et al., 2024, https://arxiv.org/abs/2406.16450, section 2.
    """

    rank: int
    blocks: int

    equations: ClassVar[tuple[str | None, str | None]] = ("nkp,kpq->nkq", None)

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_count("blocks", self.blocks)
        check_divides(self.blocks, "rank", self.rank)

    def shapes(self, in_features: int, out_features: int) -> Shapes:
        """``[blocks, N/blocks, rank/blocks]`` and ``[rank, M]``; see `Structure.shapes`."""
        check_rank(self.rank, in_features, out_features)
        check_divides(self.blocks, "in_features", in_features)
        block = (self.blocks, in_features // self.blocks, self.rank // self.blocks)
        return block, (self.rank, out_features)

    def through(self, rows: jax.Array, first: Product, second: Product) -> jax.Array:
        """See `Structure.through`."""
        hidden = first(rows.reshape(len(rows), self.blocks, rows.shape[-1] // self.blocks))
        return second(hidden.reshape(len(rows), self.rank))

    def compose(self, factors: Factors) -> jax.Array:
        """See `Structure.compose`."""
        v, u = map(in_float32, factors)
        u = u.reshape(*u.shape[:-2], self.blocks, self.rank // self.blocks, u.shape[-1])
        w = product("...kpq,...kqm->...kpm", v, u)
        return w.reshape(*w.shape[:-3], w.shape[-3] * w.shape[-2], w.shape[-1])

    def project(self, weight: jax.Array) -> Factors:
        """The truncated SVD of each block of rows; see `Structure.project`."""
        *stack, rows, columns = weight.shape
        self.shapes(rows, columns)
        parts = weight.reshape(*stack, self.blocks, rows // self.blocks, columns)
        v, u = low_rank_factors(parts, self.rank // self.blocks)
        return Factors(v, u.reshape(*stack, self.rank, columns))


@dataclasses.dataclass(frozen=True)
class BlockShuffle(Structure):
    """The structure of two block-diagonal factors with a shuffle after each (Monarch).

    ``V [blocks, N/blocks, q]`` and ``U [blocks, q, M/blocks]`` with ``q = min(N, M) / blocks``.
    Block λ of ``U`` reads the outputs λ, λ + blocks, λ + 2 blocks, … of ``V``, and its own outputs
    go to these places of the layer's output.

    Args:
      blocks: Number of blocks of each factor. It divides ``N`` and ``M``, and is at most ``q``.

    Raises:
      ValueError: If ``blocks`` is not a positive integer; where the structure meets a weight, if
        ``blocks`` does not divide both sides, or is above ``q``, with which parts of the weight
        would be zero.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> structure = lro.layers.BlockShuffle(blocks=2)
      >>> factors = structure.init(jax.random.key(0), 8, 16)
      >>> factors.first.shape, factors.second.shape
      ((2, 4, 4), (2, 4, 8))

    Reference:
      Wei et al., 2024, https://arxiv.org/abs/2406.16450, section 2; Dao et al., Monarch, 2022,
      https://arxiv.org/abs/2204.00595.
    """

    blocks: int

    equations: ClassVar[tuple[str | None, str | None]] = ("knp,kpq->knq", "lnr,lrs->lns")

    def __post_init__(self) -> None:
        check_count("blocks", self.blocks)

    def shapes(self, in_features: int, out_features: int) -> Shapes:
        """``[blocks, N/blocks, q]`` and ``[blocks, q, M/blocks]``; see `Structure.shapes`."""
        check_divides(self.blocks, "in_features", in_features)
        check_divides(self.blocks, "out_features", out_features)
        smaller = min(in_features, out_features)
        if self.blocks**2 > smaller:
            raise ValueError(
                f"blocks={self.blocks} leaves zeros in a weight {in_features} × {out_features}: "
                f"its square must be at most {smaller}, the smaller side."
            )
        hidden = smaller // self.blocks
        first = (self.blocks, in_features // self.blocks, hidden)
        return first, (self.blocks, hidden, out_features // self.blocks)

    def through(self, rows: jax.Array, first: Product, second: Product) -> jax.Array:
        """See `Structure.through`."""
        # Blocks come first, as in the factors: with them in the middle XLA's CPU backend moves the
        # gradients of both products once more.
        count, inputs = rows.shape
        parts = rows.reshape(count, self.blocks, inputs // self.blocks)
        hidden = jnp.moveaxis(first(jnp.moveaxis(parts, 1, 0)), 0, 1)
        shuffled = hidden.reshape(count, hidden.shape[-1], self.blocks)
        outputs = jnp.moveaxis(second(jnp.moveaxis(shuffled, -1, 0)), 0, -1)
        return outputs.reshape(count, outputs.shape[1] * self.blocks)

    def compose(self, factors: Factors) -> jax.Array:
        """See `Structure.compose`."""
        v, u = map(in_float32, factors)
        *stack, blocks, inputs, width = v.shape
        # What the rows of V's block make of all hidden units, of which only its own are not zero.
        own = jnp.arange(blocks)
        hidden = jnp.zeros((*stack, blocks, inputs, blocks, width), v.dtype)
        hidden = hidden.at[..., own, :, own, :].set(jnp.moveaxis(v, -3, 0))
        hidden = hidden.reshape(*stack, blocks * inputs, width, blocks)
        w = product("...nrl,...lrs->...nsl", hidden, u)
        return w.reshape(*stack, blocks * inputs, w.shape[-2] * blocks)

    def project(self, weight: jax.Array) -> Factors:
        """The truncated SVD of each part where two blocks meet; see `Structure.project`."""
        self.shapes(*weight.shape[-2:])
        return block_shuffle_factors(weight, self.blocks)
