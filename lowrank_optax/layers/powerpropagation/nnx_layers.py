"""Powerpropagation in Flax NNX: a linear layer, and a wrapper for any module."""

from collections.abc import Callable
import copy
from typing import Any

from flax import nnx
import jax

from lowrank_optax.layers.powerpropagation.reparameterisation import (
    Where,
    change_alpha,
    power,
    powerprop,
    powerprop_inverse,
)


class PowerpropLinear(nnx.Linear):
    r"""``nnx.Linear`` with the kernel :math:`\theta |\theta|^{\alpha - 1}`.

    The parameter ``kernel`` is :math:`\theta`, ``[in, out]``, initialised such that the layer
    computes what ``nnx.Linear`` with the same key does.

    Args:
      in_features: Number of inputs.
      out_features: Number of outputs.
      alpha: Exponent, a Python number of at least 1; 1 is exactly ``nnx.Linear``.
      rngs: Random keys for the initial weights.
      **options: Other arguments of ``nnx.Linear``.

    Raises:
      ValueError: If ``alpha`` is below 1, or ``kernel_init`` returns zeros only.

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
        self._map_kernel(powerprop_inverse, alpha)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Compute the outputs ``[..., out]`` from inputs ``[..., in]``."""
        layer = copy.copy(self)
        # Not setattr: NNX would refuse it if the layer belongs to an enclosing trace.
        vars(layer)["kernel"] = self.kernel.replace(self.effective_kernel())
        return nnx.Linear.__call__(layer, inputs, out_sharding)

    def effective_kernel(self) -> jax.Array:
        """Return the weights ``[in, out]``, to prune by and to export."""
        return power(self.kernel[...], self.alpha)

    def change_alpha(self, alpha: float) -> None:
        """Change the exponent and keep the weights: see `change_alpha`."""
        self._map_kernel(change_alpha, self.alpha, alpha)
        self.alpha = alpha

    def _map_kernel(self, function: Callable[..., Any], *alphas: float) -> None:
        # By attribute: a frozen kernel is a variable of another type than nnx.Param.
        self.kernel[...] = function({"kernel": self.kernel[...]}, *alphas, "kernel")["kernel"]


class PowerpropModule(nnx.Module):
    r"""Powerpropagation for the weights of any NNX module.

    The selected ``nnx.Param`` of the module become :math:`\theta`, in place; a call runs it with
    :math:`\theta |\theta|^{\alpha - 1}` instead. Its other variables (statistics, random streams)
    are shared, so calls update them. `export` undoes the wrapping.

    Args:
      module: Module with initial or pretrained weights.
      alpha: Exponent, a Python number of at least 1.
      where: Parameters, as for `powerprop`.

    Raises:
      ValueError: As `powerprop_inverse`; when called, if the module has no ``nnx.Param``.

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
        _map_params(module, powerprop_inverse, alpha, where)
        self.module, self.alpha, self.where = module, alpha, where

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with its effective weights."""
        graphdef, params, rest = nnx.split(self.module, nnx.Param, ...)
        weights = powerprop(_checked(self.module, params), self.alpha, self.where)
        return nnx.merge(graphdef, weights, rest)(*args, **kwargs)

    def change_alpha(self, alpha: float) -> None:
        """Change the exponent and keep the weights: see `change_alpha`."""
        _map_params(self.module, change_alpha, self.alpha, alpha, self.where)
        self.alpha = alpha

    def export(self) -> nnx.Module:
        """Return the module itself, with the weights as its parameters again."""
        _map_params(self.module, powerprop, self.alpha, self.where)
        self.alpha = 1.0
        return self.module


def _map_params(module: nnx.Module, function: Callable[..., Any], *args: Any) -> None:
    nnx.update(module, function(_checked(module, nnx.state(module, nnx.Param)), *args))


def _checked(module: nnx.Module, params: Any) -> Any:
    if not jax.tree.leaves(params):
        raise ValueError(
            f"{type(module).__name__} has no nnx.Param whose weights could be computed: leave its "
            "parameters nnx.Param, and freeze them by the optimizer's `wrt`."
        )
    return params
