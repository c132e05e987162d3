"""Powerpropagation in Flax NNX: a linear layer, and a wrapper for any module."""

from collections.abc import Callable
import copy
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from lowrank_optax.layers.powerpropagation.reparameterisation import (
    Where,
    change_alpha,
    power,
    powerprop,
    powerprop_inverse,
    selected,
)
from lowrank_optax.matrices.paths import path_string


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

    @property
    def plain_weights(self) -> bool:
        """Whether the parameter is the weight, so that adapters may read and change it."""
        return self.alpha == 1

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
    are shared, so calls update them. What is selected stays so if it becomes a variable of another
    type, as frozen parameters do. `export` undoes the wrapping.

    Args:
      module: Module with initial or pretrained weights.
      alpha: Exponent, a Python number of at least 1.
      where: Parameters, as for `powerprop`.

    Attributes:
      module: The module given.
      alpha: The exponent; `change_alpha` sets it.
      paths: Paths of the selected parameters in the module.

    Raises:
      ValueError: As `powerprop_inverse`, or if the module has no ``nnx.Param``; when called, if a
        selected parameter is no longer an array of real numbers in the module.

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
        params = nnx.state(module, nnx.Param)
        if not jax.tree.leaves(params):
            raise ValueError(f"{type(module).__name__} has no nnx.Param to be reparameterised.")
        nnx.update(module, powerprop_inverse(params, alpha, where))
        leaves = jax.tree_util.tree_leaves_with_path(params)
        both = zip(leaves, selected(params, where), strict=True)
        self.module, self.alpha = module, alpha
        self.paths = tuple(path_string(path) for (path, _), is_chosen in both if is_chosen)

    @property
    def plain_weights(self) -> bool:
        """Whether the parameters are the weights, so that adapters may read and change them."""
        return self.alpha == 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with its effective weights."""
        graphdef, theta, rest = self._split()
        weights = powerprop(theta, self.alpha, _EVERY)
        return nnx.merge(graphdef, weights, rest)(*args, **kwargs)

    def change_alpha(self, alpha: float) -> None:
        """Change the exponent and keep the weights: see `change_alpha`."""
        _, theta, _ = self._split()
        nnx.update(self.module, change_alpha(theta, self.alpha, alpha, _EVERY))
        self.alpha = alpha

    def export(self) -> nnx.Module:
        """Return the module itself, with the weights as its parameters again."""
        self.change_alpha(1.0)
        return self.module

    def _split(self) -> tuple[Any, Any, Any]:
        # By path: a parameter frozen later is a variable of another type than nnx.Param.
        is_chosen = lambda path, _: "/".join(map(str, path)) in self.paths
        graphdef, theta, rest = nnx.split(self.module, is_chosen, ...)
        leaves = jax.tree_util.tree_leaves_with_path(theta)
        found = [path_string(p) for p, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        if missing := sorted(set(self.paths) - set(found)):
            raise ValueError(
                f"the reparameterised parameters {', '.join(missing)} are no longer arrays of real "
                f"numbers in the {type(self.module).__name__}: put them back, or export the module "
                "before it is changed and wrap it again."
            )
        return graphdef, theta, rest


_EVERY = ""  # a pattern found in every path
