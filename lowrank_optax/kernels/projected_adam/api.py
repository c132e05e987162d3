"""Adam in a fixed subspace of a gradient, in one pass over memory."""

from typing import Any

import jax

from lowrank_optax.kernels.adam import AdamScalars, as_float32
from lowrank_optax.kernels.dispatch import Implementation, Operation, dispatch
from lowrank_optax.kernels.moments import check_moment
from lowrank_optax.kernels.projected_adam.reference import reference
from lowrank_optax.quantization import BlockFormat, Quantized

_OPERATION = Operation("projected_adam", reference, {"mosaic_tpu": f"{__package__}.mosaic_tpu"})


def projected_adam(
    gradient: jax.Array,
    basis: jax.Array,
    first: jax.Array | Quantized,
    second: jax.Array | Quantized,
    param: jax.Array | None,
    scalars: AdamScalars,
    *,
    axis: int = -2,
    formats: tuple[BlockFormat, BlockFormat] | None = None,
    implementation: Implementation = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | Quantized, jax.Array | Quantized]:
    r"""One step of Adam in the subspace of a basis that stays as it is.

    The gradient's coordinates :math:`R = P^\top G` (where columns are compressed :math:`G P`) move
    the moments; Adam's direction :math:`u` is lifted, :math:`U = P u` (:math:`u P^\top`), and the
    parameter becomes :math:`p - \eta (\alpha U + \lambda p)`. All in float32; products at the
    highest precision. Kernels write over the memory of what they replace, if it may be.

    Args:
      gradient: ``[*batch, m, n]``, float32 or bfloat16.
      basis: ``[*batch, d, r]``, orthonormal columns, with ``d`` the size of the compressed axis.
      first: The first moment ``[*batch, r, n]`` (where columns are compressed ``[*batch, m, r]``),
        float32, or codes and scales of it.
      second: The second.
      param: ``[*batch, m, n]``, any float dtype; or None.
      scalars: Learning rate and the like.
      axis: The compressed axis: -2, rows, or -1, columns.
      formats: Of both moments if they are in codes; otherwise None.
      implementation: None for what fits best; see `lowrank_optax.kernels.Implementation`.
      interpret: For tests: runs a kernel named by ``implementation`` without its device.

    Returns:
      The new parameter, in its dtype, or where there is none :math:`\alpha U` in float32; and both
      moments.

    Raises:
      ValueError: If shapes do not agree, or there is no such implementation.
      NotImplementedError: If a kernel asked for cannot take these arrays; with the reason.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax.kernels import AdamScalars, projected_adam
      >>> basis, moment = jnp.eye(3, 1), jnp.zeros((1, 2))
      >>> g = jnp.array([[1.0, -2.0], [3.0, 4.0], [5.0, 6.0]])
      >>> step = AdamScalars(0.1, 0.9, 0.999, 1e-8, 0.0, 1 - 0.9, 1 - 0.999, scale=0.5)
      >>> update, first, _ = projected_adam(g, basis, moment, moment, None, step)
      >>> print(update[0].round(3), jnp.any(update[1:]), first.round(3))
      [ 0.5 -0.5] False [[ 0.1 -0.2]]

    References:
      Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, 2024,
      https://arxiv.org/abs/2403.03507, algorithm 2.
    """
    if axis not in (-2, -1):
        raise ValueError(f"axis={axis!r} must be -2, where rows are compressed, or -1.")
    if gradient.ndim < 2 or basis.shape[:-1] != (*gradient.shape[:-2], gradient.shape[axis]):
        raise ValueError(
            f"basis {basis.shape} does not fit a gradient {gradient.shape} compressed along axis "
            f"{axis}: it must be [*batch, d, rank]."
        )
    if param is not None and param.shape != gradient.shape:
        raise ValueError(f"param {param.shape} must have the shape of gradient, {gradient.shape}.")
    rank, (*batch, m, n) = basis.shape[-1], gradient.shape
    shape = (*batch, rank, n) if axis == -2 else (*batch, m, rank)
    for name, moment, fmt in zip(
        ("first", "second"), (first, second), formats or (None, None), strict=True
    ):
        check_moment(name, moment, fmt, shape)
    arguments = (gradient, basis, first, second, param, as_float32(scalars))
    return dispatch(_OPERATION, implementation, interpret, *arguments, axis=axis, formats=formats)
