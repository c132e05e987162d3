"""ComRoPE in Flax NNX."""

from typing import Any, Literal, TypeAlias, get_args

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.layers.comrope.commuting_rotations import (
    check_axial,
    check_blocks,
    position_rotations,
    rotate_heads,
)
from lowrank_optax.layers.comrope.rope_form import RopeForm, to_rope
from lowrank_optax.layers.counts import check_count

ComRoPEVariant: TypeAlias = Literal["ld", "ap"]
"""Linearly dependent angle matrices, or an axial partition."""


class ComRoPE(nnx.Module):
    """Rotary positions on any number of axes, by trainable commuting angle matrices.

    Call it on queries and keys before attention. Optimizers see its parameters as vectors: they are
    not projected, and `lro.training` does not decay them. For Linen use
    ``nnx.bridge.to_linen(lro.layers.ComRoPE, …)``.

    Args:
      num_heads: Number of heads; with grouped-query attention that of keys, so that the queries of
        a group are rotated as their key.
      head_dim: Width of a head.
      num_axes: Number of position axes: 1 for a text, 2 for an image, 3 for a video.
      block_size: Side of the rotated blocks, at least 2; it divides ``head_dim``.
      variant: ``"ld"``, in which each block turns with a trained sum of all axes, or ``"ap"``, in
        which it turns with one axis.
      init_std: Standard deviation of the initial angle matrices. 0 rotates nothing at first, for a
        model that was trained without rotary positions.
      param_dtype: Dtype of the parameters.
      rngs: Random keys for the initial values.

    Attributes:
      angle_matrices: Parameter ``[num_heads, head_dim / block_size, block_size, block_size]``.
      axis_scale: Parameter ``[num_axes, head_dim / block_size]``, standard normal at first; None
        for ``"ap"``.

    Raises:
      ValueError: If ``block_size`` does not divide ``head_dim``, ``variant`` is not a name,
        a number is out of range, or for ``"ap"`` the axes do not divide the number of blocks; when
        called, if shapes do not fit or as `lowrank_optax.layers.comrope.position_rotations`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> rope = lro.layers.ComRoPE(2, 16, num_axes=2, rngs=nnx.Rngs(0))
      >>> query = key = jnp.ones((3, 16, 2, 16))  # a batch of 3, 4 × 4 patches
      >>> query, key = rope(query, key, lro.layers.comrope.grid_positions((4, 4)))
      >>> query.shape, rope.angle_matrices.shape, rope.axis_scale.shape
      ((3, 16, 2, 16), (2, 2, 8, 8), (2, 2))

    Reference:
      Yu et al., 2025, https://arxiv.org/abs/2506.03737.
    """

    axis_scale: nnx.Param | None

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_axes: int = 1,
        block_size: int = 8,
        variant: ComRoPEVariant = "ld",
        init_std: float = 1.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_blocks(head_dim, block_size)
        check_count("num_heads", num_heads)
        check_count("num_axes", num_axes)
        if variant not in get_args(ComRoPEVariant):
            raise ValueError(f"variant must be 'ld' or 'ap', got {variant!r}.")
        if not 0 <= init_std < float("inf"):
            raise ValueError(f"init_std must be a finite number of at least 0, got {init_std!r}.")
        count = head_dim // block_size
        if variant == "ap":
            check_axial(count, num_axes)
        self.num_heads, self.head_dim, self.num_axes = num_heads, head_dim, num_axes
        shape = num_heads, count, block_size, block_size
        initial = init_std * jax.random.normal(rngs.params(), shape, param_dtype)
        self.angle_matrices = nnx.Param(initial)
        self.axis_scale = nnx.data(None)
        if variant == "ld":
            scale = jax.random.normal(rngs.params(), (num_axes, count), param_dtype)
            self.axis_scale = nnx.Param(scale)

    def __call__(
        self, query: jax.Array, key: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Rotate queries and keys.

        Args:
          query: ``[..., n, heads, head_dim]``, with a multiple of ``num_heads``.
          key: ``[..., n, num_heads, head_dim]``.
          positions: ``[..., n, num_axes]``, float32; without the batch's axis if its positions are
            the same, which makes their rotations once.

        Returns:
          Both, rotated; shapes and dtypes stay.
        """
        if positions.shape[-1:] != (self.num_axes,):
            raise ValueError(
                f"positions has shape {positions.shape}; its last axis must have "
                f"num_axes={self.num_axes}."
            )
        if key.ndim < 3 or key.shape[-2] != self.num_heads:
            raise ValueError(
                f"key has shape {key.shape}; it must be [..., n, num_heads={self.num_heads}, "
                f"head_dim={self.head_dim}]."
            )
        rotations = position_rotations(positions, *self._parameters())
        return rotate_heads(query, rotations), rotate_heads(key, rotations)

    def to_rope(self) -> RopeForm:
        """The basis and frequencies of plain RoPE, see `lowrank_optax.layers.comrope.to_rope`."""
        return to_rope(*self._parameters(), num_axes=self.num_axes)

    def _parameters(self) -> tuple[Any, Any]:
        scale = self.axis_scale
        return self.angle_matrices[...], None if scale is None else scale[...]
