"""LoRA-FA: LoRA with the first factor frozen."""

import dataclasses

import jax
from jax.nn import initializers
import jax.numpy as jnp

from lowrank_optax.adapters.base import AdapterParams, Arrays, Weights
from lowrank_optax.adapters.low_rank import for_each
from lowrank_optax.adapters.methods.lora import LoRA
from lowrank_optax.matrices.orthonormal import orthonormalize


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    r"""LoRA with a frozen random ``A``: :math:`y = x W + s\,(\mathrm{drop}(x) A) B`.

    The gradient of ``B``, :math:`s\,(x A)^\top G`, needs ``r`` numbers of each token and not the
    ``d_in`` of the input, and half the parameters are trained. Inputs that something else saves (a
    plain LoRA on one of query, key and value; a checkpointed block) are still saved.

    This alone is the first version of the paper. The later one chains `lora_fa_projection` before
    the optimizer.

    Args:
      orthonormal: Whether the columns of ``A`` are made orthonormal; the projection is then a
        factor ``1/s²``.

    Other options are those of `LoRA`. For an embedding ``A`` is standard normal and ``B`` zero.

    Raises:
      ValueError: In ``init``, if ``A`` has fewer rows than orthonormal columns.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.adapters.LoRAFA(rank=2).init(jax.random.key(0), jnp.zeros((1, 4, 3)))
      >>> print({k: v.shape for k, v in params.trainable.items()}, params.frozen["A"].shape)
      {'B': (1, 2, 3)} (1, 4, 2)

    Reference:
      Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
      Fine-tuning, 2023, https://arxiv.org/abs/2308.03303.
    """

    orthonormal: bool = False

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """LoRA's arrays, ``A`` among the frozen ones."""
        lora = super().init_layers(key, weights, shared, embedding=embedding)
        trainable = dict(lora.trainable)
        return AdapterParams(trainable, lora.frozen | {"A": trainable.pop("A")})

    def _first(self, key: jax.Array, shape: tuple[int, int, int], embedding: bool) -> jax.Array:
        if not embedding:
            a = super()._first(key, shape, embedding)
        else:  # LoRA's would be zero, and stay so
            a = for_each(initializers.normal(1.0), key, shape, self.param_dtype)
        if not self.orthonormal:
            return a
        if shape[-1] > shape[-2]:
            raise ValueError(
                f"orthonormal=True: {shape[-2]} inputs have no {shape[-1]} orthonormal directions; "
                "lower the rank."
            )
        return orthonormalize(a.astype(jnp.float32)).astype(a.dtype)

    def _second(self, key: jax.Array, shape: tuple[int, int, int], embedding: bool) -> jax.Array:
        return super()._second(key, shape, embedding and self.initial == "random")
