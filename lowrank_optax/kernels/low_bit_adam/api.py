"""Adam with its moments in codes of 8 or 4 bits, in one pass over memory."""

from typing import Any

import jax

from lowrank_optax.kernels.adam import AdamScalars, as_float32
from lowrank_optax.kernels.dispatch import Implementation, Operation, dispatch
from lowrank_optax.kernels.low_bit_adam.reference import reference
from lowrank_optax.kernels.moments import check_moment
from lowrank_optax.quantization import BlockFormat, Quantized

_OPERATION = Operation(
    "low_bit_adam",
    reference,
    {name: f"{__package__}.{name}" for name in ("mosaic_tpu", "triton")},
)


def low_bit_adam(
    gradient: jax.Array,
    first: Quantized,
    second: Quantized,
    param: jax.Array | None,
    scalars: AdamScalars,
    *,
    formats: tuple[BlockFormat, BlockFormat],
    implementation: Implementation = None,
    interpret: Any = False,
) -> tuple[jax.Array, Quantized, Quantized]:
    r"""One step of AdamW: moments decoded, moved, used, and put in codes again.

    .. math::
        m = \beta_1 \hat m + (1 - \beta_1) g, \quad v = \beta_2 \hat v + (1 - \beta_2) g^2, \quad
        u = \frac{m / c_1}{\sqrt{v / c_2} + \epsilon}, \quad p' = p - \eta (\alpha u + \lambda p)

    The update is of the moments before they are rounded. All arithmetic is in float32; kernels
    write over the memory of what they replace, if it may be (donate it to `jax.jit`).

    Args:
      gradient: ``[..., n]``, float32 or bfloat16.
      first: Codes and scales of the first moment, as `quantize` made them of a ``[..., n]`` array.
      second: Of the second.
      param: ``[..., n]``, any float dtype; or None.
      scalars: Learning rate and the like.
      formats: Of both moments.
      implementation: None for what fits best; see `lowrank_optax.kernels.Implementation`.
      interpret: For tests: runs a kernel named by ``implementation`` without its device.

    Returns:
      The new parameter, in its dtype, or where there is none :math:`\alpha u` in float32; and both
      moments.

    Raises:
      ValueError: If shapes do not agree, or there is no such implementation.
      NotImplementedError: If a kernel asked for cannot take these arrays; with the reason.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from lowrank_optax.kernels import AdamScalars, low_bit_adam
      >>> from lowrank_optax.quantization import BlockFormat, code_map, quantize
      >>> formats = BlockFormat(code_map(), 4), BlockFormat(code_map(signed=False), 4, True)
      >>> g = jnp.array([0.5, -2.0, 0.0, 1.0])
      >>> moments = [quantize(jnp.zeros(4), fmt) for fmt in formats]
      >>> step = AdamScalars(0.1, 0.9, 0.999, 1e-8, 0.0, 1 - 0.9, 1 - 0.999)
      >>> p, first, second = low_bit_adam(g, *moments, jnp.ones(4), step, formats=formats)
      >>> print(np.asarray(p, np.float64).round(3), first.codes)
      [0.9 1.1 1.  0.9] [201   0 127 219]

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021,
      https://arxiv.org/abs/2110.02861. Loshchilov and Hutter, Decoupled Weight Decay
      Regularization, 2019, https://arxiv.org/abs/1711.05101.
    """
    if param is not None and param.shape != gradient.shape:
        raise ValueError(
            f"param of shape {param.shape} must have that of gradient, {gradient.shape}."
        )
    for name, moment, fmt in zip(("first", "second"), (first, second), formats, strict=True):
        check_moment(name, moment, fmt, gradient.shape)
    arguments = (gradient, first, second, param, as_float32(scalars))
    return dispatch(_OPERATION, implementation, interpret, *arguments, formats=formats)
