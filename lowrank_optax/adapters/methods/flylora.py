"""FlyLoRA: a frozen sparse projection routes each token to the few ranks it is largest in."""

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple, get_args
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.base import Adapter, AdapterParams, Arrays, Axes, Weights
from lowrank_optax.adapters.low_rank import LowRank, check_rank
from lowrank_optax.adapters.operands import Operand, Rows
from lowrank_optax.adapters.statistics import with_statistic

Score = Literal["magnitude", "signed", "biased_magnitude"]


class UnroutedLoRA(NamedTuple):
    """The LoRA that a FlyLoRA becomes when every token uses every rank.

    Attributes:
      A: First factor ``[d_in, r]``.
      B: Second factor ``[r, d_out]``, float32, with the scale.
      relative_error: Norm of the difference of the two adapters' outputs on the inputs given,
        relative to the norm of FlyLoRA's; a float32 scalar.
    """

    A: jax.Array
    B: jax.Array
    relative_error: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlyLoRA(LowRank):
    r"""LoRA with a frozen sparse random ``A`` that routes: each token uses ``k`` of ``r`` ranks.

    .. math::
      u = \mathrm{drop}(x) A, \qquad
      S = \mathrm{top}_k(|u| + d), \qquad
      y = x W + s \sum_{i \in S} u_i B_i, \qquad s = \alpha / r .

    Ties go to the lower rank. Only ``B [L, r, d_out]`` is trained by gradients, each of its rows by
    the tokens that use it. ``balance_bias [L, r]``, the ``d`` above, is float32 and has no part in
    the output but by the choice of ``S``. It is among the trained arrays because its gradient says
    how to balance the ranks: it is the share of tokens that use a rank, less the mean ``k / r``.
    Wrap the optimizer in `flylora_balance`, which applies the paper's rule to it.

    Every column of ``A [L, d_in, r]`` has exactly ``max(1, floor(density d_in))`` entries other
    than zero. The change depends on the input, so it cannot be merged or exported:
    `unrouted_lora` gives LoRA factors that ignore the routing, with their error. With
    ``active = rank`` nothing is routed: there is no bias, and this is `LoRAFA` with this ``A``,
    which is then dense by default.

    Args:
      rank: The rank ``r``, or one for each layer of a stack.
      active: The ranks that a token uses, ``k``.
      density: Share of entries of ``A`` that are not zero; None for ``k / r``.
      alpha: The change is scaled by ``alpha / rank``; None for ``alpha = 2 rank``.
      score: What the largest ``k`` are of: ``"magnitude"``, ``|u| + d``; ``"signed"``, ``u + d``,
        as in the official code; ``"biased_magnitude"``, ``|u + d|``, as in the official minimal
        file. The last one cannot be balanced: a lower bias of an overused rank raises ``|u + d|``.
      std: Standard deviation of the entries of ``A`` that are not zero; None for ``1 / r``. A
        column's squared length is then about ``d_in k / r³``, 1.0 for 4096 inputs and the default
        ranks but 28 for 14336 inputs and ``r = 16``.

    Other options, and errors, are those of `LowRank`.

    Raises:
      TypeError: If ``active`` is not an int.
      ValueError: If an option is out of its range.

    Warns:
      UserWarning: For ``score="biased_magnitude"``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> method, weights = lro.adapters.FlyLoRA(rank=4, active=1, alpha=4), jnp.zeros((1, 8, 2))
      >>> params = method.init(jax.random.key(0), weights)
      >>> print(jnp.sum(params.frozen["A"] != 0, axis=1))
      [[2 2 2 2]]
      >>> p = method.layer_arrays(params, 0) | {"A": jnp.eye(4), "B": jnp.ones((4, 2))}
      >>> from lowrank_optax.adapters.operands import Rows
      >>> x = Rows(jnp.array([[1.0, -3.0, 2.0, 0.0]]))
      >>> print(method.branch(p, x, y=jnp.zeros((1, 2)), weight=jnp.zeros((4, 2))))
      [[-3. -3.]]

    Reference:
      FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise
      Mixture-of-Experts, 2025, https://arxiv.org/abs/2510.08396.
    """

    axes: ClassVar[Axes] = {"A": ("in", None), "B": (None, "out")}
    statistics: ClassVar[frozenset[str]] = frozenset({"balance_bias"})

    rank: int | tuple[int, ...] = 32
    active: int = 8
    density: float | None = None
    score: Score = "magnitude"
    std: float | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        check_rank(self.active, name="active")
        lowest = min(self.rank) if isinstance(self.rank, tuple) else self.rank
        if self.active > lowest:
            raise ValueError(f"active={self.active} must be at most the rank, {lowest}.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density={self.density!r} must be above 0 and at most 1.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha != 0):
            raise ValueError(f"alpha={self.alpha!r} must be finite and not 0.")
        if self.std is not None and not (math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"std={self.std!r} must be finite and above 0.")
        if self.score not in get_args(Score):
            raise ValueError(f"score={self.score!r} must be one of {get_args(Score)}.")
        if self.score == "biased_magnitude" and self.routes:
            message = (
                "score='biased_magnitude' cannot be balanced: the bias of an overused rank falls "
                "for ever. Use 'magnitude', unless you reproduce the official minimal file."
            )
            warnings.warn(message, UserWarning, stacklevel=3)

    @property
    def routes(self) -> bool:
        """Whether any token leaves a rank out."""
        return self.active < self.max_rank

    @property
    def has_delta(self) -> bool:
        """Whether every token uses every rank: only then is the change a matrix."""
        return not self.routes

    def scale_of(self, rank: int) -> float:
        """``alpha / rank``, which is 2 by default."""
        return 2.0 if self.alpha is None else self.alpha / rank

    def nonzeros(self, d_in: int, rank: int) -> int:
        """The entries other than zero of each column of an ``A`` of that rank."""
        if self.density is None:
            return max(1, d_in * self.active // rank)
        # A product that is a whole number but for its rounding is that number.
        return max(1, math.floor(d_in * self.density * (1 + 1e-12)))

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """``A`` sparse and random, ``B`` and the bias zero."""
        del shared, embedding
        layers, d_in, d_out = weights.shape
        ranks = self.ranks(layers)
        nonzeros = np.array([self.nonzeros(d_in, int(r)) for r in ranks])
        std = np.broadcast_to(1 / ranks if self.std is None else self.std, (layers,))

        def first(key: jax.Array, rank: Any, nonzeros: Any, std: Any) -> jax.Array:
            of_places, of_values = jax.random.split(key)
            inputs = jnp.broadcast_to(jnp.arange(d_in)[:, None], (d_in, self.max_rank))
            places = jax.random.permutation(of_places, inputs, axis=0, independent=True)
            values = std * jax.random.normal(of_values, places.shape)
            used = (places < nonzeros) & (jnp.arange(self.max_rank) < rank)
            return jnp.where(used, values, 0).astype(self.param_dtype)

        a = jax.vmap(first)(jax.random.split(key, layers), ranks, nonzeros, std)
        trained = {"B": jnp.zeros((layers, self.max_rank, d_out), self.param_dtype)}
        if self.routes:
            # Steps of 1e-3 would be lost to the rounding of bfloat16.
            trained["balance_bias"] = jnp.zeros((layers, self.max_rank), jnp.float32)
        return AdapterParams(trained, {"A": a} | self.rank_scales(layers))

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """``A`` and ``s B``, of all ranks."""
        return p["A"], self.scaled(p, p["B"])

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
        """``s (mask u) B`` with ``u = drop(x) A``; see `Adapter.branch`.

        Rows of ``B`` are not gathered: a masked product with all ranks is faster.
        """
        del weight, bias
        x = self.dropped(x, key)
        if not self.routes:
            return self.times(p, x)
        u = x.float32_product(p["A"])
        used = self.used(p, u)
        u = jax.lax.select(used, u, jnp.zeros_like(u)).astype(y.dtype)
        return jax.checkpoint(self._second)(dict(p), u, used)  # saves u and the mask for backward

    def used(self, p: Arrays, u: jax.Array) -> jax.Array:
        """Which ranks tokens use, bool ``[..., r]``, from ``u [..., r]`` and the bias."""
        u, d = jax.lax.stop_gradient((u, p["balance_bias"]))
        d = d if d.ndim == 1 else d[..., None, :]  # batch axes, then tokens
        scores = {
            "magnitude": lambda: jnp.abs(u) + d,
            "signed": lambda: u + d,
            "biased_magnitude": lambda: jnp.abs(u + d),
        }
        score, within = scores[self.score](), self._within(p)
        return are_largest(
            score if within is None else jnp.where(within, score, -jnp.inf), self.active
        )

    def _within(self, p: Arrays) -> jax.Array | None:
        """Which ranks a layer has, bool ``[*batch, 1, r]``; None if it has all."""
        if "rank_scale" not in p:
            return None
        within = p["rank_scale"] != 0
        return within if within.ndim == 1 else within[..., None, :]

    def _second(self, p: Arrays, u: jax.Array, used: jax.Array) -> jax.Array:
        """``s u B``, with the excess of each rank's tokens as the gradient of the bias."""
        out = Rows(u) @ self.scaled(p, p["B"])
        within = self._within(p)
        ranks = self.max_rank if within is None else jnp.sum(within, axis=-1, keepdims=True)
        excess = used.astype(jnp.float32) - self.active / ranks
        excess = excess if within is None else jnp.where(within, excess, 0)
        z = jnp.matmul(excess, p["balance_bias"][..., None], precision=jax.lax.Precision.HIGHEST)
        return with_statistic(out, z)

    def delta(self, p: Arrays, weight: jax.Array) -> jax.Array:
        """The product of the factors if every token uses every rank; see `Adapter.delta`."""
        return Adapter.delta(self, p, weight) if self.routes else super().delta(p, weight)

    def to_lora(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """The factors if every token uses every rank; see `Adapter.to_lora`.

        Raises:
          TypeError: If tokens are routed.
        """
        if self.routes:
            raise TypeError(
                f"FlyLoRA routes each token to {self.active} ranks, which no LoRA does. "
                "`unrouted_lora` gives the LoRA that uses all ranks, and how far off it is."
            )
        return self.factors(p)

    def unrouted_lora(self, p: Arrays, x: jax.Array) -> UnroutedLoRA:
        """LoRA factors that use all ranks for every token, and their error on inputs.

        Args:
          p: One layer's arrays.
          x: Inputs of the layer ``[..., d_in]``: take those of real data, for the error depends on
            them.

        Returns:
          The factors and the relative error of their output. The error is often large: the ranks
          that routing leaves out have smaller outputs, but there are more of them.

        Raises:
          ValueError: If ``x`` does not have ``d_in`` features.

        Example:
          >>> import jax.numpy as jnp, lowrank_optax as lro
          >>> p = {"A": jnp.eye(2), "B": jnp.eye(2), "balance_bias": jnp.zeros(2)}
          >>> method, x = lro.adapters.FlyLoRA(rank=2, active=1), jnp.array([[4.0, 3.0]])
          >>> print(method.unrouted_lora(p, x).relative_error)
          0.75
        """
        first, second = self.factors(p)
        if x.shape[-1:] != first.shape[-2:-1]:
            raise ValueError(f"x of shape {x.shape} must be [..., {first.shape[-2]}], as A's rows.")
        x = x.astype(jnp.float32)
        unrouted = jnp.matmul(jnp.matmul(x, first.astype(jnp.float32)), second)
        routed = self.branch(p, Rows(x), y=unrouted, weight=unrouted)
        off = jnp.linalg.norm(unrouted - routed)
        error = jnp.where(off == 0, 0, off / jnp.linalg.norm(routed))
        return UnroutedLoRA(first, second, error)


def are_largest(score: jax.Array, k: int) -> jax.Array:
    """Which of the last axis are its ``k`` largest, bool; ties go to the lower index.

    It counts for each the larger ones: elementwise, without a sort, fused by XLA into what uses it.
    """
    index = jnp.arange(score.shape[-1])
    other, own = score[..., None, :], score[..., :, None]
    larger = jnp.where(index[None, :] < index[:, None], other >= own, other > own)
    return jnp.sum(larger, axis=-1) < k
