"""Powerpropagation in Flax Linen: a dense layer, and a wrapper for any module."""

from typing import Any

from flax import linen as nn
import jax

from lowrank_optax.layers.powerpropagation.reparameterisation import powerprop, powerprop_inverse
from lowrank_optax.layers.powerpropagation.where import Where


class PowerpropDense(nn.Dense):
    r"""``nn.Dense`` with the kernel :math:`\theta |\theta|^{\alpha - 1}`.

    The parameter ``kernel`` is :math:`\theta`, ``[in, out]``, drawn such that the layer starts as
    the plain one with the same key does.

    Attributes:
      alpha: The exponent, at least 1; at 1 the layer is ``nn.Dense`` to the last bit. The others
        are those of ``nn.Dense``.

    Raises:
      ValueError: When called: if ``alpha`` is below 1.

    Example:
      >>> from flax import linen as nn
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> layer, x = lro.layers.linen.PowerpropDense(4, alpha=2.0), jnp.ones((2, 3))
      >>> outputs, _ = layer.init_with_output(jax.random.key(0), x)
      >>> plain, _ = nn.Dense(4).init_with_output(jax.random.key(0), x)
      >>> print(bool(jnp.allclose(outputs, plain, atol=1e-6)))
      True

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296.
    """

    alpha: float = 1.5

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The layer's outputs ``[..., out]`` for inputs ``[..., in]``."""
        run = _reparameterised(nn.Dense.__call__, self, self.alpha, "(^|/)kernel$")
        return run(self, inputs)


class PowerpropModule(nn.Module):
    r"""Any Linen module with Powerpropagation for its weights.

    The collection ``params`` holds :math:`\theta`, drawn such that the module starts as it would
    without; the module sees :math:`\theta |\theta|^{\alpha - 1}` in its place. Its parameters lie
    under ``module``.

    Attributes:
      module: The module.
      alpha: The exponent, at least 1.
      where: Which parameters, as for `powerprop`; paths as in ``params``.

    Raises:
      ValueError: When called: as `powerprop`.

    Example:
      >>> from flax import linen as nn
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> wrapped = lro.layers.linen.PowerpropModule(nn.Conv(3, (3, 3)), 1.5, where="kernel")
      >>> variables = wrapped.init(jax.random.key(0), jnp.ones((1, 4, 4, 2)))
      >>> print(jax.tree.map(jnp.shape, variables))
      {'params': {'module': {'bias': (3,), 'kernel': (3, 3, 2, 3)}}}

    Reference:
      Schwarz et al., 2021, https://arxiv.org/abs/2110.00296.
    """

    module: nn.Module
    alpha: float = 1.5
    where: Where = None

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with its effective weights."""
        call = lambda module, *args, **kwargs: module(*args, **kwargs)
        run = _reparameterised(call, self, self.alpha, self.where)
        return run(self.module, *args, **kwargs)


def _reparameterised(call: Any, module: nn.Module, alpha: float, where: Where) -> Any:
    """A method that sees the weights in the place of ``params``."""
    return nn.map_variables(
        call,
        "params",
        trans_in_fn=lambda variables: powerprop(variables, alpha, where),
        # Weights are drawn as ever, and stored is what gives them.
        trans_out_fn=lambda variables: powerprop_inverse(variables, alpha, where),
        init=module.is_initializing(),
    )
