"""MiSS (Bone): one trained matrix whose rows inputs share, or blocks that multiply the weight."""

import dataclasses
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.adapters.base import Adapter, AdapterParams, Arrays, Axes, Weights
from lowrank_optax.adapters.low_rank import LowRank, check_rank
from lowrank_optax.adapters.operands import Operand, Rows
from lowrank_optax.matrices.orthonormal import in_turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiSS(LowRank):
    r"""Matrix shard sharing (MiSS, also Bone and DiSHA): one trained matrix instead of LoRA's two.

    .. math:: y = x W + S D, \qquad S_c = \sum_{i \bmod r = c} x_i

    Row ``i`` of the change is row ``i mod r`` of ``D``. The first factor is a matrix of zeros and
    ones that plain activations are never multiplied with: ``S`` is a sum over blocks of ``r``
    inputs. If ``r`` does not divide ``d_in``, the last block is shorter. ``D`` starts at zero.

    Arrays of a stack ``[L, d_in, d_out]``: trained ``D [L, r, d_out]``, PEFT's ``miss_block``; not
    trained ``row [L, d_in]``, int32, the row of ``D`` that each input uses. With ``mini_rank`` the
    trained array is ``mini [L, r, mini_rank]`` instead, ``D`` repeats its columns, and ``repeats``,
    int8 zeros ``[L, d_out / mini_rank]``, says by its length how often.

    Args:
      rank: The rank ``r``, at most ``d_in``.
      mini_rank: Number of trained columns, which outputs share as inputs share the rows; it has to
        divide ``d_out``. None for a column for each output. It is PEFT's ``mini_r`` with
        ``init_weights="mini"``.
      alpha: Must be None: there is no scale.

    Other options are those of `LowRank`.

    Raises:
      TypeError: If `rank` is not one int, or `mini_rank` is not an int or None.
      ValueError: If an option is out of its range; in ``init``, if `rank` is above ``d_in`` or
        `mini_rank` does not divide ``d_out``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> method, weights = lro.adapters.MiSS(rank=2), jnp.zeros((1, 5, 2))
      >>> p = method.layer_arrays(method.init(jax.random.key(0), weights), 0)
      >>> print(p["D"].shape, p["row"])
      (2, 2) [0 1 0 1 0]
      >>> print(method.delta(p | {"D": jnp.array([[1.0, 10.0], [100.0, 1000.0]])}, weights[0]))
      [[   1.   10.]
       [ 100. 1000.]
       [   1.   10.]
       [ 100. 1000.]
       [   1.   10.]]

    Reference:
      Kang and Yin, MiSS (before: Bone, DiSHA), 2024, https://arxiv.org/abs/2409.15371. Rows are
      shared cyclically, as in https://github.com/huggingface/peft.
    """

    axes: ClassVar[Axes] = {"row": ("in",), "D": (None, "out")}

    rank: int | tuple[int, ...] = 64
    mini_rank: int | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        check_rank(self.rank)
        super().__post_init__()
        _check_no_alpha(self.alpha)
        if self.mini_rank is not None:
            check_rank(self.mini_rank, name="mini_rank")

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """Zeros, and which row each input uses."""
        del key, shared, embedding
        layers, d_in, d_out = weights.shape
        rank, columns = self.max_rank, self.mini_rank or d_out
        if rank > d_in:
            raise ValueError(f"rank={rank} must be at most d_in of the weight [{d_in}, {d_out}].")
        if d_out % columns:
            raise ValueError(
                f"mini_rank={columns} must divide d_out of the weight [{d_in}, {d_out}]."
            )
        row = jnp.tile(jnp.arange(d_in, dtype=jnp.int32) % rank, (layers, 1))
        zeros = jnp.zeros((layers, rank, columns), self.param_dtype)
        if self.mini_rank is None:
            return AdapterParams({"D": zeros}, {"row": row})
        repeats = jnp.zeros((layers, d_out // columns), jnp.int8)
        return AdapterParams({"mini": zeros}, {"row": row, "repeats": repeats})

    def times(self, p: Arrays, x: Operand) -> jax.Array:
        """``S D``, with ``S`` by a sum over blocks where the input is plain rows."""
        if not isinstance(x, Rows):
            return super().times(p, x)
        return Rows(_block_sums(x.x, self.max_rank)) @ _all_columns(p)

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """The zeros and ones ``[..., d_in, r]``, and ``D`` with a column for each output."""
        return jax.nn.one_hot(p["row"], self.max_rank), _all_columns(p)


Side = Literal["out", "in"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiSSBat(Adapter):
    r"""MiSS's block-affine form: blocks that multiply the weight, a change of full rank.

    .. math:: \Delta_{jq} = C_q (W_{jq} + I), \qquad C_q = D_q^\top

    :math:`W_{jq}` is the ``r × r`` block of input block ``j`` and output block ``q``. It is the
    first version of Bone, and PEFT's ``init_weights="bat"``. With ``side="in"`` there is a block
    for each input block instead, :math:`\Delta_{jq} = C_j (W_{jq} + I)`, as in the authors'
    RWKV trainer. ``D`` starts at zero.

    Parameters of a stack ``[L, d_in, d_out]``: ``D [L, d_out / r, r, r]``, or ``[L, d_in / r, r,
    r]`` with ``side="in"``, with the axes of PEFT's ``miss_block``.

    The change depends on the weight. Each adapter of a layer multiplies the base's weight, so
    several add up and their order has no meaning; in PEFT the second one multiplies the weight that
    the first has changed. It can be merged only alone and at strength 1.

    Args:
      rank: Size ``r`` of a block; it has to divide ``d_in`` and ``d_out``.
      side: Whether each block of outputs or of inputs has a block of ``D``.
      alpha: Must be None: there is no scale.
      param_dtype: Dtype of ``D``.

    Raises:
      TypeError: If `rank` is not an int.
      ValueError: If an option is out of its range; in ``init``, if `rank` does not divide both
        sides of the weight.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> weight = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> p = {"D": jnp.array([[[0.5, 0.0], [0.25, 0.5]]])}
      >>> print(lro.adapters.MiSSBat(rank=2).delta(p, weight))
      [[1.75 2.25]
       [1.5  2.5 ]]

    Reference:
      Kang and Yin, Bone, 2024, https://arxiv.org/abs/2409.15371v1. A block for each output block is
      the form of https://github.com/huggingface/peft.
    """

    axes: ClassVar[Axes] = {}

    rank: int = 64
    side: Side = "out"
    alpha: None = None
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Checks the options."""
        check_rank(self.rank)
        _check_no_alpha(self.alpha)
        if self.side not in get_args(Side):
            raise ValueError(f"side={self.side!r} must be one of {get_args(Side)}.")

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """``D`` zero."""
        del key, shared, embedding
        layers, d_in, d_out = weights.shape
        if d_in % self.rank or d_out % self.rank:
            raise ValueError(
                f"rank={self.rank} must divide both sides of the weight [{d_in}, {d_out}]: blocks "
                "of MiSSBat cannot be shorter. MiSS takes any rank up to d_in."
            )
        blocks = (d_out if self.side == "out" else d_in) // self.rank
        d = jnp.zeros((layers, blocks, self.rank, self.rank), self.param_dtype)
        return AdapterParams({"D": d}, {})

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
        """The product with `delta`, which is computed again for the backward pass.

        With ``side="in"`` and plain rows it is ``z W`` plus the sum of the blocks of ``z`` for each
        output block, where block ``j`` of ``z`` is that of ``x`` times ``C_j``.
        """
        del y, bias, key
        if self.side == "in" and isinstance(x, Rows):
            return self._of_rows(p["D"], x.x, weight)
        # Closed over, not passed: an operand is not a pytree.
        return jax.checkpoint(lambda d, weight: x @ self.delta({"D": d}, weight))(p["D"], weight)

    def _of_rows(self, d: jax.Array, x: jax.Array, weight: jax.Array) -> jax.Array:
        apart = x.reshape(*x.shape[:-1], -1, self.rank)
        rows = "n" if d.ndim > 3 else ""  # matrices with batch axes have rows on one axis
        z = jnp.einsum(f"...{rows}jb,...jab->...{rows}ja", apart, d.astype(x.dtype))
        ones = jnp.sum(z, axis=-2, dtype=jnp.float32).astype(x.dtype)
        repeated = jnp.tile(ones, weight.shape[-1] // self.rank)
        return Rows(z.reshape(x.shape)) @ weight + repeated

    def delta(self, p: Arrays, weight: jax.Array) -> jax.Array:
        """``C (W + I)`` of each block; see `Adapter.delta`."""
        blocks, c = self._blocks(weight.astype(jnp.float32)), _transposed(p)
        return self._matrix(_product(c, blocks) + self._spread(c, blocks), weight.shape)

    def unmerged(self, p: Arrays, merged: jax.Array) -> jax.Array:
        """The weight before `merged`: ``(I + C)⁻¹ (W' - C)`` of each block, in float32.

        NaN where ``I + C`` is singular to float32's precision, for then ``W`` is lost.
        """
        blocks, c = self._blocks(merged.astype(jnp.float32)), _transposed(p)
        matrices = jnp.eye(self.rank) + c
        sizes = in_turn(lambda x: jnp.linalg.svd(x, compute_uv=False), matrices)
        singular = sizes[..., -1] <= self.rank * jnp.finfo(jnp.float32).eps * sizes[..., 0]
        inverse = in_turn(lambda x: jnp.linalg.inv(x), matrices)
        inverse = jnp.where(singular[..., None, None], jnp.nan, inverse)
        before = _product(inverse, blocks - self._spread(c, blocks))
        return self._matrix(before, merged.shape).astype(merged.dtype)

    def _blocks(self, weight: jax.Array) -> jax.Array:
        """``[..., k, a, l, c]``: block ``k`` has the ``k``-th block of ``D``, ``a`` and ``c`` are
        the inputs and outputs in it, ``l`` counts the blocks of the other side.
        """
        *batch, d_in, d_out = weight.shape
        r = self.rank
        blocks = weight.reshape(*batch, d_in // r, r, d_out // r, r)
        return blocks if self.side == "in" else jnp.swapaxes(blocks, -4, -2)

    def _matrix(self, blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `_blocks`."""
        return (blocks if self.side == "in" else jnp.swapaxes(blocks, -4, -2)).reshape(shape)

    def _spread(self, c: jax.Array, blocks: jax.Array) -> jax.Array:
        """``C I`` for every block."""
        return jnp.broadcast_to(c[..., :, :, None, :], blocks.shape)


def _product(c: jax.Array, blocks: jax.Array) -> jax.Array:
    return jnp.einsum("...kab,...kblc->...kalc", c, blocks, precision=jax.lax.Precision.HIGHEST)


def _transposed(p: Arrays) -> jax.Array:
    return p["D"].astype(jnp.float32).mT


def _all_columns(p: Arrays) -> jax.Array:
    """``D`` in float32, ``[..., r, d_out]``."""
    if "D" in p:
        return p["D"].astype(jnp.float32)
    return jnp.tile(p["mini"].astype(jnp.float32), p["repeats"].shape[-1])


def _block_sums(x: jax.Array, size: int) -> jax.Array:
    """The sum ``[..., size]`` of blocks of that size, the last one filled with zeros."""
    filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
    apart = filled.reshape(*x.shape[:-1], -1, size)
    return jnp.sum(apart, axis=-2, dtype=jnp.float32).astype(x.dtype)


def _check_no_alpha(alpha: Any) -> None:
    if alpha is not None:
        raise ValueError(
            f"alpha={alpha!r} must be None: MiSS has no scale. Change the learning rate, or the "
            "adapter's strength once it is trained."
        )
