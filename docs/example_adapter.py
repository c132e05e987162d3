"""A new adapter method is one file: LoRA-XS, with what `LowRank` leaves to say, and its use."""

import dataclasses
from typing import ClassVar

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp

import lowrank_optax as lro
from lowrank_optax.adapters.base import Axes
from lowrank_optax.adapters.spectra import truncated_svd


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAXS(lro.adapters.LowRank):
    """Trains ``R [L, r, r]`` between two frozen factors of the weight (arXiv:2405.17604)."""

    # Which axes of the arrays are the weight's inputs and outputs: how they are sharded.
    axes: ClassVar[Axes] = {"A": ("in", None), "B": (None, "out")}

    @property
    def reads_weights(self) -> bool:
        """Whether the initial values depend on the weights' values."""
        return True

    def init_layers(self, key, weights, shared, *, embedding=False):
        """Arrays of a stack of layers whose weights are ``[L, d_in, d_out]``."""
        u, s, v = truncated_svd(weights, self.max_rank)
        trained = {"R": jnp.zeros((len(weights), s.shape[-1], s.shape[-1]), self.param_dtype)}
        return lro.adapters.AdapterParams(trained, {"A": u * s[:, None, :], "B": v.mT})

    def factors(self, p):
        """The two factors ``[d_in, r]`` and ``[r, d_out]`` of one layer's change."""
        return p["A"], p["R"].astype(jnp.float32) @ self.scaled(p, p["B"])


def in_nnx(model: nnx.Module, where: str) -> nnx.Module:
    """Adapts layers of an NNX model, in place."""
    return lro.adapters.attach(model, LoRAXS(rank=4), where, rngs=0)


def in_linen(module: nn.Module, where: str) -> lro.adapters.linen.Adapted:
    """Adapts layers of a Linen model, which stays as it is."""
    return lro.adapters.linen.Adapted(module, LoRAXS(rank=4), where)


def in_pytree(params, where: str) -> lro.adapters.pytree.PytreeAdapter:
    """Adapts leaves of the parameters of any function."""
    return lro.adapters.pytree.init(jax.random.key(0), params, LoRAXS(rank=4), where)
