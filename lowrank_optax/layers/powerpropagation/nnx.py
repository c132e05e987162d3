"""Powerpropagation in Flax NNX: a linear layer, and a wrapper for any module."""

import copy
from typing import Any

from flax import nnx
import jax

from lowrank_optax.layers.powerpropagation.power import power
from lowrank_optax.layers.powerpropagation.reparameterisation import (
    change_alpha,
    powerprop,
    powerprop_inverse,
)
from lowrank_optax.layers.powerpropagation.where import Where

_KERNEL = r"^kernel$"


class PowerpropLinear(nnx.Linear):
    r"""``nnx.Linear`` with the kernel :math:`\theta |\theta|^{\alpha - 1}`.

    The parameter ``kernel`` is :math:`\theta`, ``[in, out]``, drawn such that the layer starts as
    the plain one with the same key does.

    Args:
      in_features: Number of inputs.
      out_features: Number of outputs.
      alpha: The exponent, a Python number of at least 1; 1 is ``nnx.Linear`` to the last bit.
      rngs: Of the initial weights.
      **options: Those of ``nnx.Linear``.

    Raises:
      ValueError: If ``alpha`` is below 1, or ``kernel_init`` gives zeros alone.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.layers.PowerpropLinear(3, 4, alpha=2.0, rngs=nnx.Rngs(0))
      >>> plain, x = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 3))
      >>> print(bool(jnp.allclose(layer(x), plain(x), atol=1e-6)))
      True

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        alpha: float,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self.alpha = alpha
        drawn = {"kernel": self.kernel[...]}
        self.kernel.set_value(powerprop_inverse(drawn, alpha, _KERNEL)["kernel"])

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """The layer's outputs ``[..., out]`` for inputs ``[..., in]``."""
        plain = copy.copy(self)
        plain.kernel = nnx.Param(self.effective_kernel())
        return nnx.Linear.__call__(plain, inputs, out_sharding)

    def effective_kernel(self) -> jax.Array:
        """The weights ``[in, out]``: what to prune by, and to export."""
        return power(self.kernel[...], self.alpha)

    def change_alpha(self, alpha: float) -> None:
        """Another exponent from now on, with the weights as they are: see `change_alpha`."""
        kernel = {"kernel": self.kernel[...]}
        self.kernel.set_value(change_alpha(kernel, self.alpha, alpha, _KERNEL)["kernel"])
        self.alpha = alpha


class PowerpropModule(nnx.Module):
    r"""Any NNX module with Powerpropagation for its weights.

    The module's ``nnx.Param`` become :math:`\theta`, where ``where`` says so; a call runs it with
    :math:`\theta |\theta|^{\alpha - 1}` in their place. Its other variables (statistics, random
    streams) are shared, so they change as ever. Wrapping changes the given module, whose parameters
    these are; `export` undoes it.

    Args:
      module: The module, with initial or pretrained weights.
      alpha: The exponent, a Python number of at least 1.
      where: Which parameters, as for `powerprop`.

    Raises:
      ValueError: As `powerprop_inverse`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> conv, x = nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0)), jnp.ones((1, 4, 4, 2))
      >>> before = conv(x)
      >>> wrapped = lro.layers.PowerpropModule(conv, 1.5, where="kernel")
      >>> print(bool(jnp.allclose(wrapped(x), before, atol=1e-6)))
      True

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296.
    """

    def __init__(self, module: nnx.Module, alpha: float, where: Where = None) -> None:
        weights = nnx.state(module, nnx.Param)
        nnx.update(module, powerprop_inverse(weights, alpha, where))
        self.module, self.alpha, self.where = module, alpha, where

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with its effective weights."""
        graphdef, params, rest = nnx.split(self.module, nnx.Param, ...)
        weights = powerprop(params, self.alpha, self.where)
        return nnx.merge(graphdef, weights, rest)(*args, **kwargs)

    def change_alpha(self, alpha: float) -> None:
        """Another exponent from now on, with the weights as they are: see `change_alpha`."""
        params = nnx.state(self.module, nnx.Param)
        nnx.update(self.module, change_alpha(params, self.alpha, alpha, self.where))
        self.alpha = alpha

    def export(self) -> nnx.Module:
        """The module with the weights as its parameters: Powerpropagation undone, in place."""
        params = nnx.state(self.module, nnx.Param)
        nnx.update(self.module, powerprop(params, self.alpha, self.where))
        self.alpha = 1.0
        return self.module
