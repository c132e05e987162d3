"""What structures of a weight have in common, and the product with one."""

from collections.abc import Callable
import math
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.layers.structured.factors import Factors, cast
from lowrank_optax.matrices.polar import polar_factor

Shapes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
Product: TypeAlias = Callable[[jax.Array], jax.Array]
"""The product of rows with a factor."""


class Structure:
    """How a weight ``[N, M]`` is made of two factors: a `LowRank`, `BlockDense` or `BlockShuffle`.

    Attributes:
      equations: The einsum of rows with each factor; None where it is ``rows @ factor``.
    """

    equations: ClassVar[tuple[str | None, str | None]]

    def shapes(self, in_features: int, out_features: int) -> Shapes:
        """The factors' shapes.

        Raises:
          ValueError: If the structure does not fit a weight of this size.
        """
        raise NotImplementedError

    def init(
        self,
        key: jax.Array,
        in_features: int,
        out_features: int,
        *,
        initializer_range: float = 0.02,
        dtype: DTypeLike = jnp.float32,
    ) -> Factors:
        """Initial factors: random blocks with singular values of 1; for `LowRank` see there.

        Args:
          key: PRNG key.
          in_features: ``N``.
          out_features: ``M``.
          initializer_range: Standard deviation of the dense weight that `LowRank` starts from.
          dtype: Dtype of the factors.

        Raises:
          ValueError: If the structure does not fit a weight of this size.
        """
        del initializer_range  # scaled to singular values of 1
        keys = jax.random.split(key)
        shapes = self.shapes(in_features, out_features)
        wide = jnp.promote_types(dtype, jnp.float32)
        draw = lambda key, shape: polar_factor(jax.random.normal(key, shape, wide))
        return cast(Factors(*map(draw, keys, shapes)), dtype)

    def through(self, rows: jax.Array, first: Product, second: Product) -> jax.Array:
        """Rows ``[n, N]`` through the products with both factors, to ``[n, M]``."""
        raise NotImplementedError

    def compose(self, factors: Factors) -> jax.Array:
        """The weight ``[..., N, M]``, in float32 at least."""
        raise NotImplementedError

    def project(self, weight: jax.Array) -> Factors:
        """The factors of a weight ``[..., N, M]``, in float32 at least, that come nearest to it.

        Raises:
          ValueError: If the structure does not fit a weight of this size.
        """
        raise NotImplementedError


def structured_linear(x: jax.Array, factors: Factors, structure: Structure) -> jax.Array:
    """The product of ``x`` with a structured weight, by its factors.

    Args:
      x: Inputs ``[..., N]``.
      factors: The weight's factors, not stacked. The dtypes of all are promoted; each product is
        accumulated in float32 at least and rounded to the promoted dtype.
      structure: What they are factors of.

    Returns:
      Outputs ``[..., M]``, ``x @ structure.compose(factors)``.

    Raises:
      ValueError: If a factor does not have the shape that the structure gives it, or ``x`` is not
        ``[..., N]``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> v = jnp.arange(1.0, 9).reshape(2, 2, 2)
      >>> u = jnp.arange(1.0, 13).reshape(2, 2, 3) / 10
      >>> factors, shuffle = lro.layers.Factors(v, u), lro.layers.BlockShuffle(blocks=2)
      >>> print(lro.layers.structured_linear(jnp.arange(1.0, 5), factors, shuffle).round(1))
      [17.9 57.  22.9 63.  27.9 69. ]

    Reference:
      Wei et al., 2024, https://arxiv.org/abs/2406.16450, section 2.
    """
    v, u = factors
    axes = tuple(3 if equation else 2 for equation in structure.equations)
    if (v.ndim, u.ndim) != axes:
        raise ValueError(
            f"factors {v.shape} and {u.shape} do not fit {structure}, whose factors have {axes[0]} "
            f"and {axes[1]} axes: call it for stacked factors through jax.vmap."
        )
    inputs = math.prod(v.shape[:-1])
    outputs = u.shape[0] * u.shape[2] if structure.equations[1] else u.shape[1]
    expected = structure.shapes(inputs, outputs)
    if (v.shape, u.shape) != expected or x.shape[-1:] != (inputs,):
        raise ValueError(
            f"x {x.shape} and factors {v.shape} and {u.shape} do not fit {structure}: for these "
            f"sides the factors are {expected[0]} and {expected[1]}, and x is [..., {inputs}]."
        )
    dtype = jnp.result_type(x, v, u)

    def times(factor: jax.Array, equation: str | None) -> Product:
        factor = factor.astype(dtype)
        return lambda h: h @ factor if equation is None else jnp.einsum(equation, h, factor)

    first, second = map(times, factors, structure.equations)
    rows = x.astype(dtype).reshape(-1, inputs)
    return structure.through(rows, first, second).reshape(*x.shape[:-1], outputs)


def check_divides(blocks: int, name: str, size: int) -> None:
    """Raises ValueError unless the number of blocks divides a size."""
    if size % blocks:
        fits = max(b for b in range(1, blocks) if size % b == 0)
        raise ValueError(f"blocks={blocks} does not divide {name}={size}; blocks={fits} does.")


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """Raises ValueError if a rank is above a side of the weight."""
    most = min(in_features, out_features)
    if rank > most:
        raise ValueError(
            f"rank={rank} is above a side of a weight {in_features} × {out_features}: it must be "
            f"at most {most}."
        )
