"""AdamW with low-bit states whose whole step is one pass over memory, parameters included."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.kernels import AdamScalars, Implementation, low_bit_adam
from lowrank_optax.kernels.adam import adam_direction, adam_moments, applied
from lowrank_optax.matrices.argument_names import explains_names
from lowrank_optax.quantization import Bits, Quantized
from lowrank_optax.states.low_bit import LowBitState, Which, low_bit, moment_formats


class FusedOptimizer(NamedTuple):
    """An optimizer that changes parameters itself, where an optax transformation gives updates.

    Attributes:
      init: ``init(params) -> state``.
      step: ``step(gradients, state, params) -> (params, state)``. Jit it, and donate the state and
        the parameters: they are then written over in place.
    """

    init: Callable[[optax.Params], Any]
    step: Callable[[optax.Updates, LowBitState, optax.Params], tuple[optax.Params, LowBitState]]


@explains_names
def fused_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    bits: Bits = 8,
    block_size: int | None = None,
    min_size: int = 4096,
    which: Which | None = None,
    implementation: Implementation = None,
) -> FusedOptimizer:
    """``low_bit(optax.adamw(...))`` in one pass: decode, step, encode and apply together.

    For each parameter it reads the gradient, the parameter and two codes, and writes the parameter
    and the codes, and nothing else: on TPUs and GPUs by a kernel, elsewhere by the same arithmetic
    in jax.numpy. Arrays that a kernel does not take, or that are sharded over several devices, go
    that way everywhere; under `jax.shard_map` kernels run on each device.

    Arithmetic is float32, also for float64 parameters. The state is that of
    ``low_bit(optax.scale_by_adam(...))``: their checkpoints are interchangeable.

    Args:
      learning_rate: A float or an optax schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, after bias correction.
      weight_decay: Decoupled decay, times the learning rate.
      mask: Which leaves decay: as ``mask`` of ``optax.adamw``.
      bits: 8 or 4; this and the next three as in `low_bit`.
      block_size: Elements to a scale.
      min_size: Smaller arrays keep float32 moments.
      which: Which moments are in codes.
      implementation: None for the best there is, or ``"xla"``, ``"mosaic_tpu"``, ``"triton"``.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.fused_adamw(0.1)
      >>> params = {"kernel": jnp.ones((64, 256)), "bias": jnp.zeros(256)}
      >>> step = jax.jit(tx.step, donate_argnums=(1, 2))
      >>> gradients = jax.tree.map(jnp.ones_like, params)
      >>> params, state = step(gradients, tx.init(params), params)
      >>> print(f"{params['kernel'][0, 0]:.5f} {params['bias'][0]:.5f}")
      0.89999 -0.10000

    Reference:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021,
      https://arxiv.org/abs/2110.02861, section 2.
    """
    formats = moment_formats(bits, block_size)
    pair = formats["signed"], formats["unsigned"]
    init = low_bit(optax.scale_by_adam(b1, b2, eps), bits, block_size, min_size, which).init

    def step(
        gradients: optax.Updates, state: LowBitState, params: optax.Params
    ) -> tuple[optax.Params, LowBitState]:
        last: Any = state.inner
        codes, scales = state.codes, state.scales
        count: Any = optax.safe_increment(last.count)
        rate = learning_rate(last.count) if callable(learning_rate) else learning_rate
        steps = count.astype(jnp.float32)
        scalars = AdamScalars(rate, b1, b2, eps, weight_decay, 1 - b1**steps, 1 - b2**steps)

        def one(
            param: jax.Array, gradient: jax.Array, decays: bool, mu: Any, nu: Any, *coded: Any
        ) -> tuple[Any, ...]:
            """A leaf's new parameter and moments: as they are, or in codes and scales."""
            own = scalars if decays else scalars._replace(weight_decay=0.0)
            if mu is None and nu is None:
                first, second = Quantized(*coded[::2]), Quantized(*coded[1::2])
                param, first, second = low_bit_adam(
                    gradient, first, second, param, own, formats=pair, implementation=implementation
                )
                return param, None, None, first.codes, second.codes, first.scales, second.scales
            if mu is None or nu is None:
                raise ValueError("which must choose both moments of a parameter, or neither.")
            mu, nu = adam_moments(gradient.astype(jnp.float32), mu, nu, own)
            param = applied(adam_direction(mu, nu, own), param, own)
            return param, mu, nu, None, None, None, None

        leaves, treedef = jax.tree.flatten(params)
        decayed = mask(params) if callable(mask) else mask
        if mask is None:
            decayed = treedef.unflatten([True] * len(leaves))
        trees = (gradients, decayed, last.mu, last.nu, codes.mu, codes.nu, scales.mu, scales.nu)
        new = list(map(one, leaves, *map(treedef.flatten_up_to, trees)))
        columns = [treedef.unflatten(column) for column in zip(*new, strict=True)] or [params] * 7
        params, mu, nu, mu_codes, nu_codes, mu_scales, nu_scales = columns
        return params, LowBitState(
            last._replace(count=count, mu=mu, nu=nu),
            codes._replace(mu=mu_codes, nu=nu_codes),
            scales._replace(mu=mu_scales, nu=nu_scales),
            (),
        )

    return FusedOptimizer(init, step)
