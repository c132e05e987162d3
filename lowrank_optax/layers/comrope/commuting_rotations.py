"""Rotations of queries and keys by trainable commuting angle matrices (ComRoPE)."""

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.comrope.block_exponentials import block_exponentials


def position_rotations(
    positions: jax.Array, angle_matrices: jax.Array, axis_scale: jax.Array | None = None
) -> jax.Array:
    r"""Return the rotation of each position, a block-diagonal matrix for each head.

    Block :math:`j` of position :math:`x` is :math:`\exp(t_j (P_j - P_j^\top))`, with
    :math:`t_j = \sum_i x_i \theta_{ij}` (linearly dependent angle matrices), or
    :math:`t_j = x_{j \bmod N}` (axial partition). All angle matrices commute, so that
    :math:`R(x)^\top R(y) = R(y - x)`: scores depend on relative positions alone.

    Args:
      positions: Real positions ``[..., n, N]`` on ``N`` axes, float32 or wider.
      angle_matrices: ``P``, ``[h, m, b, b]``: heads and blocks of their width. Its symmetric part
        does not count.
      axis_scale: ``θ``, ``[N, m]``, the same for all heads; None for the axial partition.

    Returns:
      Rotations ``[..., n, h, m, b, b]`` in float32, or wider if the positions or the angle matrices
      are.

    Raises:
      ValueError: If shapes do not fit, blocks are below 2, the axial partition has fewer blocks
        than axes or a number that they do not divide, or positions are no floats, narrower than
        float32 or (outside of ``jit``) not finite.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> rope = lro.layers.comrope.rope_angles(head_dim=8, block_size=4)
      >>> lro.layers.comrope.position_rotations(jnp.arange(5.0)[:, None], rope).shape
      (5, 1, 2, 4, 4)

    Reference:
      Yu et al., 2025, https://arxiv.org/abs/2506.03737, sections 3.3 and 3.4.
    """
    blocks = _skew(angle_matrices)
    count = blocks.shape[1]
    _check_positions(positions)
    axes = positions.shape[-1]
    if axis_scale is None:
        check_axial(count, axes)
        times = positions[..., np.arange(count) % axes]
    else:
        if axis_scale.shape != (axes, count):
            raise ValueError(
                f"axis_scale has shape {axis_scale.shape}; for positions on {axes} axes and "
                f"{count} blocks it must be {(axes, count)}."
            )
        dtype = jnp.promote_types(jnp.result_type(positions, axis_scale), jnp.float32)
        # A sum of few products, not a matmul: no backend rounds its operands.
        times = jnp.sum(positions[..., None].astype(dtype) * axis_scale.astype(dtype), axis=-2)
    return block_exponentials(times[..., None, :], blocks)


def rotate_heads(x: jax.Array, rotations: jax.Array) -> jax.Array:
    """Rotate queries or keys by the rotations of their positions.

    Args:
      x: Queries or keys ``[..., n, heads, m * b]``. Their heads are a multiple of the rotations';
        each rotation is then that of neighbouring heads, as in grouped-query attention.
      rotations: From `position_rotations`, ``[..., n, h, m, b, b]``; leading axes broadcast.

    Returns:
      The rotated ``x``, in its dtype; the product is in float32 at least.

    Raises:
      ValueError: If the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> angles = lro.layers.comrope.rope_angles(head_dim=2, block_size=2)
      >>> rotations = lro.layers.comrope.position_rotations(jnp.full((1, 1), jnp.pi), angles)
      >>> print(lro.layers.comrope.rotate_heads(jnp.ones((1, 1, 2)), rotations).round(3))
      [[[-1. -1.]]]
    """
    heads, count, size = rotations.shape[-4:-1]
    fits = x.ndim >= 3 and x.shape[-1] == count * size and x.shape[-2] % heads == 0
    if not fits or (x.shape[-3] not in (rotations.shape[-5], 1) and rotations.shape[-5] != 1):
        raise ValueError(
            f"x has shape {x.shape}; for rotations {rotations.shape} it must be "
            f"[..., {rotations.shape[-5]}, a multiple of {heads} heads, {count * size}]."
        )
    dtype = jnp.promote_types(jnp.result_type(x, rotations), jnp.float32)
    grouped = x.astype(dtype).reshape(*x.shape[:-2], heads, -1, count, size)
    # Written as sums of products, this is faster forward but far slower backward.
    rotated = jnp.einsum(
        "...hmij,...hgmj->...hgmi",
        rotations.astype(dtype),
        grouped,
        precision=jax.lax.Precision.HIGHEST,
    )
    return rotated.reshape(*rotated.shape[:-4], *x.shape[-2:]).astype(x.dtype)


def rope_angles(
    head_dim: int, block_size: int = 2, *, base: float = 10_000.0, num_heads: int = 1
) -> jax.Array:
    """Return the angle matrices that make RoPE of one axis, on neighbouring pairs of channels.

    Args:
      head_dim: Width of a head.
      block_size: Side of a block, even; pair ``j`` of the head has the frequency
        ``base ** (-2 j / head_dim)`` whatever the blocks.
      base: Base of the geometric sequence of frequencies.
      num_heads: Number of heads, all with the same angle matrices.

    Returns:
      ``[num_heads, head_dim / block_size, block_size, block_size]``, float32.

    Raises:
      ValueError: If blocks are odd or do not divide the head.

    Example:
      >>> import lowrank_optax as lro
      >>> print(lro.layers.comrope.rope_angles(head_dim=4, block_size=2)[0, :, 1, 0])
      [1.   0.01]

    Reference:
      Su et al., RoFormer, 2021, https://arxiv.org/abs/2104.09864, equation 34.
    """
    check_blocks(head_dim, block_size)
    if block_size % 2:
        raise ValueError(f"block_size={block_size} must be even: RoPE rotates pairs of channels.")
    frequencies = base ** (-np.arange(0, head_dim, 2) / head_dim)
    blocks = np.zeros((num_heads, head_dim // block_size, block_size, block_size), np.float32)
    first = np.arange(0, block_size, 2)
    blocks[..., first + 1, first] = frequencies.reshape(-1, block_size // 2)
    return jnp.asarray(blocks)


def check_blocks(head_dim: int, block_size: int) -> None:
    """Raises ValueError unless blocks of this side, at least 2, divide a head."""
    for name, value in (("head_dim", head_dim), ("block_size", block_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise ValueError(f"{name} must be an integer of at least 2, got {value!r}.")
    if head_dim % block_size:
        fits = [b for b in range(2, head_dim + 1) if head_dim % b == 0]
        raise ValueError(
            f"block_size={block_size} does not divide head_dim={head_dim}; its divisors are {fits}."
        )


def check_axial(count: int, axes: int) -> None:
    """Raises ValueError unless each axis gets the same number of blocks."""
    if axes < 1 or count % axes:
        raise ValueError(
            f"the axial partition shares {count} blocks of a head among {axes} axes: the number of "
            "axes must divide that of blocks. Take smaller blocks, or variant='ld'."
        )


def _skew(angle_matrices: jax.Array) -> jax.Array:
    shape = angle_matrices.shape
    if len(shape) != 4 or shape[-1] != shape[-2] or shape[-1] < 2:
        raise ValueError(
            f"angle_matrices has shape {shape}; it must be [heads, blocks, b, b] with b of at "
            "least 2."
        )
    wide = angle_matrices.astype(jnp.promote_types(angle_matrices.dtype, jnp.float32))
    return wide - wide.mT


def _check_positions(positions: jax.Array) -> None:
    dtype = jnp.result_type(positions)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"positions are {dtype}, in which positions or angles may be rounded: cast them to "
            "float32."
        )
    if positions.ndim < 2 or not positions.shape[-1]:
        raise ValueError(
            f"positions has shape {positions.shape}; it must be [..., positions, axes], with at "
            "least one axis."
        )
    if not isinstance(positions, jax.core.Tracer) and not np.isfinite(positions).all():
        raise ValueError("positions has values that are not finite.")
