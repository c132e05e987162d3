"""AFLoRA: LoRA with two vectors between and behind its factors, which are frozen on the way."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.base import AdapterParams, Arrays, Axes, Weights
from lowrank_optax.adapters.low_rank import LowRank, for_each, kaiming_uniform, to_float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class AFLoRA(LowRank):
    r"""Adaptive freezing of low-rank adaptation: vectors are trained to the end, factors at first.

    .. math::
      y = x W + c \, \bigl(((x A) \odot d) B\bigr) \odot b

    Parameters of a stack ``[L, d_in, d_out]``: ``A [L, d_in, r]``, ``B [L, r, d_out]``,
    ``d [L, r]``, ``b [L, d_out]``. The factors start random and ``b`` at zero, so the output does
    not change; the first step moves ``b`` alone. `aflora_freezing` around the optimizer stops the
    factors one by one. With all of them frozen this is VeRA, with factors of each layer's own.

    Args:
      alpha: ``c = alpha / rank``, as in the paper's GSM8K code; None for ``c = 1``, as in its GLUE
        code.
      freeze_square_from_start: Whether ``A`` and ``B`` of square weights are never trained: the
        GLUE code's rule for the projections of attention.

    Other options, and errors, are those of `LowRank`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> method, square, wide = lro.adapters.AFLoRA(rank=1), jnp.zeros((1, 2, 2)), (1, 2, 3)
      >>> print(sorted(method.init(jax.random.key(0), square).trainable))
      ['b', 'd']
      >>> print(sorted(method.init(jax.random.key(0), jnp.zeros(wide)).trainable))
      ['A', 'B', 'b', 'd']
      >>> p = {"A": jnp.array([[1.0], [2.0]]), "B": jnp.array([[3.0, -1.0]])}
      >>> print(method.delta(p | {"d": jnp.array([0.5]), "b": jnp.array([1.0, 2.0])}, square[0]))
      [[ 1.5 -1. ]
       [ 3.  -2. ]]

    Reference:
      Liu et al., AFLoRA, 2024, https://arxiv.org/abs/2403.13269, and its code,
      https://github.com/zeyuliu1037/AFLoRA.
    """

    axes: ClassVar[Axes] = {"A": ("in", None), "B": (None, "out"), "b": ("out",)}

    rank: int | tuple[int, ...] = 4
    freeze_square_from_start: bool = True

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """``A`` and ``B`` by He's uniform rule, ``d`` 0.1 and ``b`` zero."""
        del shared, embedding
        layers, d_in, d_out = weights.shape
        of_first, of_second = jax.random.split(key)
        draw = lambda key, *shape: for_each(kaiming_uniform(2.0), key, shape, self.param_dtype)
        a = draw(of_first, layers, d_in, self.max_rank)
        b = draw(of_second, layers, self.max_rank, d_out)
        # B's columns are drawn for the layer's own rank.
        wider = jnp.sqrt(self.max_rank / self.ranks(layers)).astype(b.dtype)[:, None, None]
        within = self.within_ranks(layers)
        factors = {
            "A": jnp.where(within[:, None], a, 0),
            "B": jnp.where(within[..., None], b * wider, 0),
        }
        vectors = {
            "d": jnp.full((layers, self.max_rank), 0.1, self.param_dtype),
            "b": jnp.zeros((layers, d_out), self.param_dtype),
        }
        constants = self.rank_scales(layers)
        if self.freeze_square_from_start and d_in == d_out:
            return AdapterParams(vectors, constants | factors)
        return AdapterParams(factors | vectors, constants)

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """``A`` and ``c diag(d) B diag(b)``."""
        d, b = to_float32(p, "d", "b")
        return p["A"], self.scaled(p, d[..., :, None] * p["B"] * b[..., None, :])
