"""Weights that are products of two factors whose directions are in order of importance.

Horváth et al., Maestro: Uncovering Low-Rank Structures via Trainable Decomposition, 2024,
https://arxiv.org/abs/2308.14929. A weight ``[N, M]`` is ``A B`` with ``A [N, R]`` and ``B [R, M]``;
direction ``k`` is column ``k`` of ``A`` and row ``k`` of ``B``. Stacked factors have leading axes.
"""

import numbers
from typing import TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lowrank_optax.layers.structured.factors import Factors, in_float32


def group_norms(factors: Factors, *, hierarchical: bool = True) -> tuple[jax.Array, jax.Array]:
    """Return the norms of the groups that Maestro's penalty is the sum of, for each factor.

    Group ``k`` of the hierarchical penalty is the tail of directions from ``k`` on, and of the
    plain one direction ``k`` alone. The gradient at a norm of zero is zero.

    Args:
      factors: ``A [..., N, R]`` and ``B [..., R, M]``.
      hierarchical: Whether groups are tails.

    Returns:
      The norms ``[..., R]`` of the groups of ``A`` and of those of ``B``, in float32 at least.
      Their sum is the penalty, and their product the importance of each direction.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> a, b = jnp.array([[3.0, 0], [4, 1]]), jnp.array([[1.0, 2], [2, 0]])
      >>> print(*lro.layers.maestro.group_norms(lro.layers.Factors(a, b)))
      [5.0990195 1.       ] [3. 2.]

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929.
    """
    a, b = map(in_float32, factors)
    squares = jnp.sum(a * a, axis=-2), jnp.sum(b * b, axis=-1)
    if hierarchical:
        squares = tuple(jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True) for x in squares)
    return _root(squares[0]), _root(squares[1])


def prefix_product(x: jax.Array, factors: Factors, rank: ArrayLike) -> jax.Array:
    """Return the product of ``x`` with the first ``rank`` directions of a weight.

    Args:
      x: Inputs ``[..., N]``.
      factors: ``A [N, R]`` and ``B [R, M]``.
      rank: Number of directions: a Python integer from 0 to R, with which the others cost nothing,
        or an int32 scalar that may be traced, which is clipped to this range and masks the others.

    Returns:
      Outputs ``[..., M]``; zeros if ``rank`` is 0.

    Raises:
      ValueError: If ``rank`` is no integer or no scalar, or a Python integer is out of range.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> a, b = jnp.array([[3.0, 0], [4, 1]]), jnp.array([[1.0, 2], [2, 0]])
      >>> factors, x = lro.layers.Factors(a, b), jnp.ones(2)
      >>> print(lro.layers.maestro.prefix_product(x, factors, 1))
      [ 7. 14.]
      >>> print(lro.layers.maestro.prefix_product(x, factors, jnp.array(2)))
      [ 9. 14.]

    Reference:
      Horváth et al., 2024, https://arxiv.org/abs/2308.14929.
    """
    a, b = factors
    check_prefix(rank, a.shape[-1])
    if is_static(rank):
        return (x @ a[:, :rank]) @ b[:rank]
    return keep_prefix(x @ a, rank) @ b


def prox_tails(columns: jax.Array, threshold: ArrayLike) -> jax.Array:
    r"""Return the proximal operator of ``threshold`` times the sum of the tails' norms.

    This is :math:`\arg\min_Y \frac{1}{2} \|Y - X\|^2 + t \sum_k \|Y_{:, k:}\|`. Groups are nested,
    so it shrinks one after another, from the last column to the whole of the matrix.

    Args:
      columns: ``X [..., N, R]``; give ``B`` of a weight as its transpose.
      threshold: ``t``, a scalar that is not negative, and may be traced.

    Returns:
      An array of this shape and dtype; a tail whose norm is at most the threshold becomes exactly
      zero.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> x = jnp.array([[3.0, 0, 0.3], [4, 1, 0.4]])
      >>> print(lro.layers.maestro.prox_tails(x, 0.6).round(5))
      [[2.64115 0.      0.     ]
       [3.52153 0.35215 0.     ]]

    Reference:
      Jenatton et al., Proximal Methods for Hierarchical Sparse Coding, 2011,
      https://arxiv.org/abs/1009.2139.
    """
    x = in_float32(columns)
    squares = jnp.moveaxis(jnp.sum(x * x, axis=-2), -1, 0)

    def step(following: jax.Array, square: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The norm that is left of a tail and its factor, from what is left of the next one."""
        norm = jnp.sqrt(square + following * following)
        left = jnp.maximum(norm - threshold, 0)
        # Not ``norm > 0``, which would hide a nan.
        return left, jnp.where(norm == 0, 0, left / jnp.where(norm == 0, 1, norm))

    nothing = jnp.zeros(squares.shape[1:], squares.dtype)
    _, factors = jax.lax.scan(step, nothing, squares, reverse=True)
    # A column is in the groups of all columns up to its own.
    factors = jnp.moveaxis(jnp.cumprod(factors, axis=0), 0, -1)
    return (x * factors[..., None, :]).astype(columns.dtype)


def keep_prefix(hidden: jax.Array, rank: ArrayLike) -> jax.Array:
    """``hidden [..., R]`` with zeros from ``rank`` on."""
    # Not a product: there, what is masked could still be nan.
    return jnp.where(jnp.arange(hidden.shape[-1]) < rank, hidden, 0)


def is_static(rank: ArrayLike | None) -> TypeGuard[int]:
    """Whether a rank is an integer of Python, so that shapes may depend on it."""
    return isinstance(rank, numbers.Integral) and not isinstance(rank, bool)


def check_prefix(
    rank: ArrayLike, width: int, stack: tuple[int, ...] = (), name: str = "rank"
) -> None:
    """Raises ValueError unless a rank is a number of directions, or one for each layer of a stack.

    Only an integer of Python must also be one of the prefixes of ``width`` directions.
    """
    if not jnp.issubdtype(jnp.result_type(rank), jnp.integer):
        raise ValueError(f"{name}={rank} must be an integer, a number of directions.")
    if jnp.shape(rank) != stack:
        raise ValueError(
            f"{name} has shape {jnp.shape(rank)} and must have {stack}: one number for each layer."
        )
    if is_static(rank) and not 0 <= rank <= width:
        raise ValueError(f"{name}={rank} must be from 0 to {width}, the number of directions.")


def _root(x: jax.Array) -> jax.Array:
    """The square root, with a gradient of zero at zero."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))
