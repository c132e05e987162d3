"""SoRA: LoRA with a gate for each rank; a proximal step sets gates that are not needed to zero."""

import dataclasses

import jax
from jax.nn import initializers
import jax.numpy as jnp

from lowrank_optax.adapters.base import AdapterParams, Arrays, Weights
from lowrank_optax.adapters.low_rank import for_each, to_float32
from lowrank_optax.adapters.methods.lora import LoRA


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoRA(LoRA):
    r"""Sparse low-rank adaptation: a LoRA that finds the rank of each layer.

    .. math:: y = x W + s\,\bigl((\mathrm{drop}(x) A) \odot g\bigr) B, \qquad s = \alpha / r

    Parameters of a stack ``[L, d_in, d_out]``: ``A [L, d_in, r]``, ``B [L, r, d_out]`` and
    ``gate [L, r]``, which is float32 whatever ``param_dtype`` is: thresholds are below the spacing
    of bfloat16. The gate starts standard normal, ``A`` and ``B`` as LoRA's.

    Wrap the optimizer in `soft_threshold_gates`, which sets gates to exact zeros; after training,
    `compact` cuts these ranks away and makes a plain LoRA of the others.

    Args:
      rank: The largest rank ``r``, or one for each layer of a stack.

    Other options, and errors, are those of `LoRA`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> method, weights = lro.adapters.SoRA(rank=2, alpha=4), jnp.zeros((1, 2, 2))
      >>> params = method.init(jax.random.key(0), weights)
      >>> print({name: x.shape for name, x in params.trainable.items()})
      {'A': (1, 2, 2), 'B': (1, 2, 2), 'gate': (1, 2)}
      >>> p = {"A": jnp.eye(2), "B": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> print(method.delta(p | {"gate": jnp.array([0.0, -1.0])}, weights[0]))
      [[ 0.  0.]
       [-6. -8.]]

    Reference:
      Ding et al., Sparse Low-rank Adaptation of Pre-trained Language Models, 2023,
      https://arxiv.org/abs/2311.11696.
    """

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """LoRA's arrays, and a standard normal gate."""
        lora = super().init_layers(key, weights, shared, embedding=embedding)
        layers, of_gate = weights.shape[0], jax.random.fold_in(key, 2)
        gate = for_each(initializers.normal(1.0), of_gate, (layers, self.max_rank), jnp.float32)
        gate = jnp.where(self.within_ranks(layers), gate, 0)
        return AdapterParams(lora.trainable | {"gate": gate}, lora.frozen)

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """``A`` and ``s diag(gate) B``."""
        gate, b = to_float32(p, "gate", "B")
        return p["A"], self.scaled(p, gate[..., :, None] * b)
