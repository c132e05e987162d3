"""PRILoRA: LoRA whose first factor is pruned by the sizes of its inputs."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.base import AdapterParams, Arrays, Axes, Weights
from lowrank_optax.adapters.methods.lora import LoRA
from lowrank_optax.adapters.operands import Operand
from lowrank_optax.adapters.statistics import with_mean_squares


@dataclasses.dataclass(frozen=True, kw_only=True)
class PRILoRA(LoRA):
    r"""Pruned and rank-increasing low-rank adaptation.

    It is LoRA, and its gradient brings the mean square of each input feature along. Wrap the
    optimizer in `prilora_pruning`, which prunes ``A`` by them; the ranks that grow with depth are
    those of `linear_ranks`, given as ``rank`` of a stack or by ``rank_pattern``.

    Parameters of a stack ``[L, d_in, d_out]``: LoRA's ``A [L, d_in, r]`` and ``B [L, r, d_out]``,
    and two float32 arrays of zeros that do not change the output, ``input_squares [L, d_in, 1]``
    and ``token_share [L, 1]``. The gradient of the second is the share of tokens that the loss
    depends on; that of the first, divided by this share, is the mean of the squares of the layer's
    input over these tokens. A tree of parameters is trained by `pytree.factored`: the sums of
    `pytree.effective` have no inputs. Forward-mode derivatives (``jax.jvp``) do not exist.

    The paper's text does not say whether layers of unlike ranks have one scale. Here they do by
    default: 1, whatever the rank.

    Args:
      scale: Scale of all layers, whatever their ranks; None for LoRA's: ``alpha / rank``, by
        default 1.

    Other options, and errors, are those of `LoRA`.

    Raises:
      ValueError: If ``scale`` is 0 or not finite, or is given beside ``alpha`` or
        ``rank_stabilized``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> ranks = lro.adapters.linear_ranks(1, 3, layers=3)
      >>> method = lro.adapters.PRILoRA(rank=ranks, scale=2.0)
      >>> params = method.init(jax.random.key(0), jnp.zeros((3, 4, 5)))
      >>> print({name: x.shape for name, x in params.trainable.items()})
      {'A': (3, 4, 3), 'B': (3, 3, 5), 'input_squares': (3, 4, 1), 'token_share': (3, 1)}
      >>> print(params.frozen["rank_scale"])
      [[2. 0. 0.]
       [2. 2. 0.]
       [2. 2. 2.]]

    Reference:
      Benedek and Wolf, PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation, 2024,
      https://arxiv.org/abs/2401.11316.
    """

    axes: ClassVar[Axes] = {**LoRA.axes, "input_squares": ("in", None)}
    statistics: ClassVar[frozenset[str]] = frozenset({"input_squares", "token_share"})

    scale: float | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if self.scale is None:
            return
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise ValueError(f"scale={self.scale!r} must be finite and not 0.")
        if self.alpha is not None or self.rank_stabilized:
            raise ValueError(
                f"scale={self.scale!r} is that of all ranks, so alpha={self.alpha!r} and "
                f"rank_stabilized={self.rank_stabilized} would have no effect: leave them out."
            )

    def scale_of(self, rank: int) -> float:
        """``scale``, or LoRA's."""
        return super().scale_of(rank) if self.scale is None else self.scale

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """LoRA's arrays, and zeros whose gradients are the statistics."""
        lora = super().init_layers(key, weights, shared, embedding=embedding)
        layers, d_in, _ = weights.shape
        slots = {
            "input_squares": jnp.zeros((layers, d_in, 1), jnp.float32),
            "token_share": jnp.zeros((layers, 1), jnp.float32),
        }
        return AdapterParams(lora.trainable | slots, lora.frozen)

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
        """LoRA's, with the statistics of ``x`` before dropout; see `Adapter.branch`."""
        out = super().branch(p, x, y=y, weight=weight, bias=bias, key=key)
        return with_mean_squares(out, x, p["input_squares"], p["token_share"])
