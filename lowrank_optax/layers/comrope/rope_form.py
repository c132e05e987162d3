"""ComRoPE as plain RoPE, after training: a basis to fold into the weights, and frequencies."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.layers.comrope.commuting_rotations import check_axial

_ZERO = 1e-8  # of the largest frequency of a block; below, float64 cannot pair its eigenvectors


class RopeForm(NamedTuple):
    """Commuting angle matrices as RoPE in another basis.

    Attributes:
      basis: Orthogonal ``[..., h, head_dim, head_dim]``. The products of queries and keys with it,
        rotated by RoPE, have the same scores.
      frequencies: Angles per unit of each axis, ``[..., h, N, head_dim / 2]``; channels ``i`` and
        ``i + head_dim / 2`` are a pair, the order of Hugging Face's Llama.
    """

    basis: jax.Array
    frequencies: jax.Array


def to_rope(
    angle_matrices: jax.Array, axis_scale: jax.Array | None = None, *, num_axes: int = 1
) -> RopeForm:
    """Return the basis and the frequencies with which plain RoPE has the same scores.

    Computed by NumPy in float64, after training; not under ``jit``.

    Args:
      angle_matrices: As for `position_rotations`, ``[..., h, m, b, b]``, stacked or not.
      axis_scale: ``[..., N, m]``; None for the axial partition.
      num_axes: Number of axes of the axial partition; not used with ``axis_scale``.

    Returns:
      The basis and the frequencies, float32.

    Raises:
      ValueError: If blocks are odd, which leaves a channel without a pair, or shapes do not fit.

    Example:
      >>> import lowrank_optax as lro
      >>> angles = lro.layers.comrope.rope_angles(head_dim=4, block_size=4)
      >>> print(lro.layers.comrope.to_rope(angles).frequencies.round(3))
      [[[1.   0.01]]]
    """
    p = np.asarray(angle_matrices, np.float64)
    count, size = p.shape[-3:-1]
    if size % 2:
        raise ValueError(
            f"blocks of {size} leave a channel without a pair; RoPE needs even blocks."
        )
    if axis_scale is None:
        check_axial(count, num_axes)
        scale = (np.arange(count) % num_axes == np.arange(num_axes)[:, None]).astype(np.float64)
    else:
        scale = np.asarray(axis_scale, np.float64)
        if scale.shape[-1] != count or scale.shape[:-2] != p.shape[:-4]:
            raise ValueError(
                f"axis_scale has shape {scale.shape}, which does not fit angle matrices {p.shape}."
            )
    skew = p - np.swapaxes(p, -1, -2)
    basis = np.zeros((*p.shape[:-3], *2 * (count * size,)))
    found = np.zeros((*p.shape[:-2], size // 2))
    half = size // 2
    for index in np.ndindex(p.shape[:-2]):
        found[index], vectors = _planes(skew[index])
        *stack, j = index
        rows = slice(j * size, (j + 1) * size)
        for part in range(2):
            first = (part * count + j) * half
            basis[(*stack, rows, slice(first, first + half))] = vectors[:, part]
    frequencies = scale[..., None, :, :, None] * found[..., None, :, :]
    frequencies = frequencies.reshape(*frequencies.shape[:-2], count * half)
    return RopeForm(jnp.asarray(basis, jnp.float32), jnp.asarray(frequencies, jnp.float32))


def fold(kernel: jax.Array, basis: jax.Array) -> jax.Array:
    """Fold the basis of `to_rope` into a projection that makes queries or keys.

    Args:
      kernel: Kernel ``[..., d_in, heads * head_dim]`` of an ``nnx.Linear``, or its bias
        ``[heads * head_dim]``, with no norm between it and the rotation.
      basis: Basis ``[h, head_dim, head_dim]``; ``heads`` is a multiple of ``h``, as for
        `rotate_heads`.

    Returns:
      The new kernel or bias, of the same shape and dtype.

    Raises:
      ValueError: If the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> form = lro.layers.comrope.to_rope(lro.layers.comrope.rope_angles(4, 4))
      >>> folded = lro.layers.comrope.fold(jnp.asarray([[1.0, 2, 3, 4]]), form.basis)
      >>> print(abs(folded))  # a plane's basis is unique to its signs
      [[1. 3. 2. 4.]]
    """
    heads, width = basis.shape[-3:-1]
    if basis.ndim != 3 or kernel.shape[-1] % (heads * width):
        raise ValueError(
            f"kernel has shape {kernel.shape} and basis {basis.shape}: the kernel's last axis must "
            "be heads * head_dim, of a multiple of the basis' heads."
        )
    dtype = jnp.promote_types(kernel.dtype, basis.dtype)
    split = kernel.reshape(*kernel.shape[:-1], heads, -1, width).astype(dtype)
    product = jnp.einsum("...hgi,hij->...hgj", split, basis, precision=jax.lax.Precision.HIGHEST)
    return product.reshape(kernel.shape).astype(kernel.dtype)


def _planes(skew: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies ``[b / 2]``, falling, and the two vectors of each plane, ``[b, 2, b / 2]``."""
    size = len(skew)
    values, vectors = np.linalg.eigh(-1j * skew)
    chosen = np.arange(size - 1, size // 2 - 1, -1)
    chosen = chosen[values[chosen] > _ZERO * max(values[-1], 0)]
    # K u = i w u: the plane of u turns from its real part to minus its imaginary part.
    turned = np.sqrt(2) * np.stack([vectors[:, chosen].real, -vectors[:, chosen].imag], axis=1)
    known = turned.reshape(size, -1)
    # What does not turn has any orthonormal basis.
    full = np.linalg.svd(known, full_matrices=True)[0] if known.size else np.eye(size)
    rest = full[:, known.shape[1] :].reshape(size, -1, 2).swapaxes(1, 2)
    frequencies = np.concatenate([values[chosen], np.zeros(size // 2 - len(chosen))])
    return frequencies, np.concatenate([turned, rest], axis=2)
