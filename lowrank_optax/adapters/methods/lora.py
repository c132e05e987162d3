"""LoRA, with rsLoRA's scale: two thin matrices beside a frozen weight."""

import dataclasses
from typing import ClassVar, Literal, get_args

import jax
from jax.nn import initializers
import jax.numpy as jnp

from lowrank_optax.adapters.base import AdapterParams, Arrays, Axes, Weights
from lowrank_optax.adapters.low_rank import LowRank, for_each, kaiming_uniform

Initial = Literal["kaiming_uniform", "he_uniform", "gaussian", "random"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    r"""Low-rank adaptation: :math:`y = x W + s\,(\mathrm{drop}(x) A) B`, :math:`s = \alpha / r`.

    Parameters of a stack ``[L, d_in, d_out]``: ``A [L, d_in, r]``, ``B [L, r, d_out]``. The paper
    writes PyTorch's ``[out, in]``: ``A`` here is ``lora_A.weight.T`` there.

    Args:
      rank_stabilized: Whether to scale by ``alpha / sqrt(rank)`` instead (rsLoRA), for ranks from
        about 32.
      initial: Initial values of ``A``, while ``B`` is zero: ``"kaiming_uniform"``,
        ``U(±1/sqrt(d_in))``, as in the official code and PEFT; ``"he_uniform"``,
        ``U(±sqrt(6/d_in))``, 2.4 times as large, as in Flax, Keras and Gemma; ``"gaussian"``, of
        deviation ``1/r``. ``"random"`` draws both as the first, for tests: the output then differs
        from the start. For an embedding, ``A`` is zero and ``B`` standard normal (with
        ``"random"`` both).

    Other options, and errors, are those of `LowRank`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> method, weights = lro.adapters.LoRA(rank=1, alpha=4), jnp.zeros((1, 2, 2))
      >>> params = method.init(jax.random.key(0), weights)
      >>> print(params.trainable["A"].shape, params.trainable["B"].shape)
      (1, 2, 1) (1, 1, 2)
      >>> p = {"A": jnp.array([[1.0], [2.0]]), "B": jnp.array([[3.0, -1.0]])}
      >>> print(method.delta(p, weights[0]))
      [[12. -4.]
       [24. -8.]]

    References:
      Hu et al., LoRA, 2021, https://arxiv.org/abs/2106.09685, equation 3.
      Kalajdzievski, rsLoRA, 2023, https://arxiv.org/abs/2312.03732.
    """

    axes: ClassVar[Axes] = {"A": ("in", None), "B": (None, "out")}

    rank_stabilized: bool = False
    initial: Initial = "kaiming_uniform"

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if self.initial not in get_args(Initial):
            raise ValueError(f"initial={self.initial!r} must be one of {get_args(Initial)}.")

    def scale_of(self, rank: int) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)``."""
        alpha = rank if self.alpha is None else self.alpha
        return alpha / (rank**0.5 if self.rank_stabilized else rank)

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """``A`` random and ``B`` zero, or the other way round for an embedding."""
        del shared
        layers, d_in, d_out = weights.shape
        of_first, of_second = jax.random.split(key)
        within = self.within_ranks(layers)
        a = self._first(of_first, (layers, d_in, self.max_rank), embedding)
        b = self._second(of_second, (layers, self.max_rank, d_out), embedding)
        trained = {"A": jnp.where(within[:, None], a, 0), "B": jnp.where(within[..., None], b, 0)}
        return AdapterParams(trained, self.rank_scales(layers))

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """``A`` and ``s B``."""
        return p["A"], self.scaled(p, p["B"])

    def _first(self, key: jax.Array, shape: tuple[int, int, int], embedding: bool) -> jax.Array:
        if embedding and self.initial != "random":
            return jnp.zeros(shape, self.param_dtype)
        if embedding:
            return for_each(initializers.normal(1.0), key, shape, self.param_dtype)
        if self.initial == "gaussian":
            a = for_each(initializers.normal(1.0), key, shape, self.param_dtype)
            return a / self.ranks(shape[0])[:, None, None].astype(a.dtype)
        uniform = kaiming_uniform(2.0 if self.initial == "he_uniform" else 1 / 3)
        return for_each(uniform, key, shape, self.param_dtype)

    def _second(self, key: jax.Array, shape: tuple[int, int, int], embedding: bool) -> jax.Array:
        if embedding:
            return for_each(initializers.normal(1.0), key, shape, self.param_dtype)
        if self.initial == "random":
            return for_each(kaiming_uniform(), key, shape, self.param_dtype)
        return jnp.zeros(shape, self.param_dtype)
