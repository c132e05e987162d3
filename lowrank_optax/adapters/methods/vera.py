"""VeRA: fixed random factors that layers share, and two trained vectors for each layer."""

from collections.abc import Hashable, Sequence
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.base import AdapterParams, Arrays, Axes, Weights
from lowrank_optax.adapters.low_rank import LowRank, kaiming_uniform, to_float32
from lowrank_optax.adapters.operands import Operand, Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(LowRank):
    r"""Vector-based random matrix adaptation, ``r + d_out`` trained numbers for each weight.

    .. math:: y = x W + \bigl( ((x A) \odot d) B \bigr) \odot b

    :math:`A` and :math:`B` are random, frozen and shared by all weights of one shape; each weight
    trains :math:`d` and :math:`b`. Since :math:`b = 0` at the start, the output does not change,
    and the first step moves :math:`b` alone. Parameters of a stack ``[L, d_in, d_out]``:
    ``d [L, r]`` and ``b [L, d_out]``; of its group ``A [d_in, r]`` and ``B [r, d_out]``.

    PEFT has one pair of the largest sizes for the whole model, of which each layer reads the first
    rows and columns. Here every shape has a pair of its own: nothing is cut, embeddings and linear
    layers can be adapted together, and the pair is sharded as the weights are.

    Args:
      rank: The rank ``r``, or one for each layer of a stack. Rank costs few trained numbers here:
        the paper takes 256 to 1024.
      alpha: Must be None: ``d`` is the scale.
      d_initial: Initial value of ``d``.

    Other options, and errors, are those of `LowRank`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> method, weights = lro.adapters.VeRA(rank=2), jnp.zeros((3, 4, 5))
      >>> params = method.init(jax.random.key(0), weights)
      >>> print(params.trainable["d"].shape, params.trainable["b"].shape)
      (3, 2) (3, 5)
      >>> p = {"A": jnp.ones((4, 1)), "B": jnp.array([[1.0, 2.0]])}
      >>> print(method.delta(p | {"d": jnp.array([3.0]), "b": jnp.array([1.0, -1.0])}, weights)[0])
      [ 3. -6.]

    Reference:
      Kopiczko, Blankevoort and Asano, VeRA: Vector-based Random Matrix Adaptation, 2023,
      https://arxiv.org/abs/2310.11454.
    """

    axes: ClassVar[Axes] = {"A": ("in", None), "B": (None, "out"), "b": ("out",)}

    rank: int | tuple[int, ...] = 256
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if self.alpha is not None:
            raise ValueError(f"alpha={self.alpha!r} must be None: set d_initial instead.")
        if not math.isfinite(self.d_initial) or self.d_initial == 0:
            raise ValueError(f"d_initial={self.d_initial!r} must be finite and not 0.")

    @property
    def shared(self) -> frozenset[str]:
        """``A`` and ``B``."""
        return frozenset({"A", "B"})

    def group(self, path: str, shape: tuple[int, int]) -> Hashable:
        """Weights of one shape and rank share the random factors."""
        return shape, self.max_rank

    def init_shared(self, key: jax.Array, members: Sequence[Weights]) -> AdapterParams:
        """``A`` and ``B`` by He's uniform rule."""
        (_, d_in, d_out), draw = members[0].shape, kaiming_uniform(2.0)
        of_first, of_second = jax.random.split(key)
        a = draw(of_first, (d_in, self.max_rank), self.param_dtype)
        b = draw(of_second, (self.max_rank, d_out), self.param_dtype)
        return AdapterParams({}, {"A": a, "B": b})

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """``d`` constant and ``b`` zero."""
        del key, shared, embedding
        layers, _, d_out = weights.shape
        d = jnp.full((layers, self.max_rank), self.d_initial, self.param_dtype)
        b = jnp.zeros((layers, d_out), self.param_dtype)
        return AdapterParams({"d": d, "b": b}, self.rank_scales(layers))

    def times(self, p: Arrays, x: Operand) -> jax.Array:
        """``(x A) (d B b)``; the backward pass saves ``x A`` and makes the scaled matrix again."""
        second = jax.checkpoint(lambda p, inner: Rows(inner) @ self.factors(p)[1])
        return second(dict(p), x @ p["A"])

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """``A`` and ``diag(d) B diag(b)``."""
        d, b = to_float32(p, "d", "b")
        return p["A"], self.scaled(p, d[..., :, None] * p["B"] * b[..., None, :])
