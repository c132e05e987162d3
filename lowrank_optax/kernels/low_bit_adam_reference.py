"""Adam with its moments in codes of 8 or 4 bits, in one pass over memory; its reference."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.kernels.adam import (
    AdamScalars,
    adam_direction,
    adam_moments,
    applied,
    as_float32,
    coded_shapes,
)
from lowrank_optax.kernels.dispatch import Implementation, dispatch
from lowrank_optax.quantization import BlockFormat, Quantized, dequantize, quantize
from lowrank_optax.quantization.blocks import same_layout
from lowrank_optax.slices.loop import Cut, run
from lowrank_optax.slices.plan import cut_of

_KERNELS = {
    "mosaic_tpu": f"{__package__}.low_bit_adam_tpu",
    "triton": f"{__package__}.low_bit_adam_triton",
}


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
    r"""One step of AdamW: decodes both moments, updates and uses them, and encodes them again.

    .. math::
        m = \beta_1 \hat m + (1 - \beta_1) g, \quad v = \beta_2 \hat v + (1 - \beta_2) g^2, \quad
        u = \frac{m / c_1}{\sqrt{v / c_2} + \epsilon}, \quad p' = p - \eta (\alpha u + \lambda p)

    The update uses the moments before they are rounded to codes. All arithmetic is in float32.
    Kernels write in place if the moments and the parameter are donated to `jax.jit`.

    Args:
      gradient: ``[..., n]``, float32 or bfloat16.
      first: First moment, codes and scales from `quantize` of a ``[..., n]`` array.
      second: Second moment, the same.
      param: ``[..., n]``, any float dtype; or None.
      scalars: Learning rate, decays and so on.
      formats: Block formats of both moments, with ``packing="rows"``.
      implementation: None for what fits best; see `lowrank_optax.kernels.Implementation`.
      interpret: For tests: runs a kernel named by ``implementation`` without its device.

    Returns:
      The new parameter in its dtype (without a parameter, :math:`\alpha u` in float32), and both
      moments.

    Raises:
      ValueError: If shapes or dtypes do not agree, or there is no such implementation.
      NotImplementedError: If a kernel asked for does not support these arrays; with the reason.

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
        if not isinstance(moment, Quantized):
            raise ValueError(f"{name} must be a Quantized: codes and scales.")
        if fmt.packing != "rows":
            raise ValueError(f"{name} has packing={fmt.packing!r}: it must be 'rows'.")
        expected = coded_shapes(gradient.shape, fmt)
        if (moment.codes.shape, moment.scales.shape) != expected:
            raise ValueError(
                f"{name} has codes and scales of shapes {moment.codes.shape} and "
                f"{moment.scales.shape}: for an array {gradient.shape} and blocks of "
                f"{fmt.block_size} they must be {expected[0]} and {expected[1]}."
            )
        dtypes = jnp.dtype(jnp.uint8), jnp.dtype(fmt.scale_dtype)
        if (moment.codes.dtype, moment.scales.dtype) != dtypes:
            raise ValueError(
                f"{name} has codes and scales of dtypes {moment.codes.dtype} and "
                f"{moment.scales.dtype}: in its format they must be {dtypes[0]} and {dtypes[1]}."
            )
    arguments = (gradient, first, second, param, as_float32(scalars))
    asked = "low_bit_adam", reference, _KERNELS, implementation, interpret
    return dispatch(*asked, *arguments, formats=formats)


def reference(
    gradient: jax.Array,
    first: Quantized,
    second: Quantized,
    param: jax.Array | None,
    scalars: AdamScalars,
    *,
    formats: tuple[BlockFormat, BlockFormat],
) -> tuple[jax.Array, Quantized, Quantized]:
    """`low_bit_adam` in plain jax.numpy: the result every kernel must agree with."""

    def step(carried: Any, gradient: jax.Array, row: Any) -> Any:
        param, first, second = carried
        m = dequantize(first, formats[0], gradient.shape)
        v = dequantize(second, formats[1], gradient.shape)
        m, v = adam_moments(gradient.astype(jnp.float32), m, v, scalars)
        direction = adam_direction(m, v, scalars)  # before the moments are rounded to codes
        result = direction if param is None else applied(direction, param, scalars)
        return result, quantize(m, formats[0]), quantize(v, formats[1])

    carried = param, first, second
    cut = None if param is None else cut_of([gradient, param])
    if cut is None or not _in_own_blocks(gradient.shape, cut, formats):
        return step(carried, gradient, None)
    return run(step, carried, gradient, cut)


def _in_own_blocks(
    shape: tuple[int, ...], cut: Cut, formats: tuple[BlockFormat, BlockFormat]
) -> bool:
    """Whether slices are made of whole blocks, so that codes and scales can be cut as they are."""
    parts = [(rows // cut.shards, *shape[1:]) for rows in (cut.rows, cut.rest) if rows]
    return all(same_layout(shape, part, fmt) for part in parts for fmt in formats)
