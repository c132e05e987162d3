"""The input of a layer, as an adapter sees it: something that can be multiplied by a matrix.

An adapter is written once, for ``x @ A`` with ``A [d_in, k]``. What that product is, the layer
knows: a convolution multiplies its patches, an embedding looks rows up, an attention projection
contracts two axes. So the adapter of a convolution is a convolution of ``k`` channels followed by
one of window 1, as in Hugging Face PEFT, and that of an embedding a table of ``k`` columns.
"""

from collections.abc import Callable
import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Operand(Protocol):
    """A layer's input."""

    def __matmul__(self, matrix: jax.Array) -> jax.Array:
        """The product ``[..., k]`` with a matrix ``[d_in, k]``, in the layer's own dtype."""
        ...

    def float32_product(self, matrix: jax.Array) -> jax.Array:
        """The same product in float32, or float64 where the layer has it: never rounded to half."""
        ...

    def drop(self, key: jax.Array, rate: float) -> "Operand":
        """The input with a fraction ``rate`` of its elements zero and the others scaled up."""
        ...

    def squared(self) -> "Operand":
        """The input with its elements squared, float32."""
        ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """Activations ``[..., d_in]``; with batch axes of the matrices in front, ``[*batch, n, d_in]``.

    Example:
      >>> import jax.numpy as jnp
      >>> print(Rows(jnp.ones((2, 3))) @ jnp.ones((3, 1)))
      [[3.]
       [3.]]
    """

    x: jax.Array

    def __matmul__(self, matrix: jax.Array) -> jax.Array:
        return jnp.matmul(self.x, matrix.astype(self.x.dtype))

    def float32_product(self, matrix: jax.Array) -> jax.Array:
        """Summed in float32 and not rounded."""
        dtype = jnp.promote_types(self.x.dtype, jnp.float32)
        return jnp.matmul(self.x, matrix.astype(self.x.dtype), preferred_element_type=dtype)

    def drop(self, key: jax.Array, rate: float) -> "Rows":
        """Inverted dropout."""
        return Rows(_dropout(self.x, key, rate))

    def squared(self) -> "Rows":
        """Squares of the activations."""
        return Rows(jnp.square(self.x.astype(jnp.float32)))


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Row numbers ``[...]`` of a table: the product with a matrix is its rows.

    Example:
      >>> import jax.numpy as jnp
      >>> print(Lookup(jnp.array([2, 0])) @ jnp.array([[1.0], [2.0], [3.0]]))
      [[3.]
       [1.]]
    """

    index: jax.Array
    dtype: jnp.dtype | None = None

    def __matmul__(self, matrix: jax.Array) -> jax.Array:
        rows = jnp.take(matrix, self.index, axis=0)
        return rows if self.dtype is None else rows.astype(self.dtype)

    def float32_product(self, matrix: jax.Array) -> jax.Array:
        """The rows, converted."""
        return _to_float32(jnp.take(matrix, self.index, axis=0))

    def drop(self, key: jax.Array, rate: float) -> "Lookup":
        """Itself: row numbers have nothing to drop."""
        return self

    def squared(self) -> "Lookup":
        """The same rows: they stand for zeros and ones."""
        return Lookup(self.index)


@dataclasses.dataclass(frozen=True)
class Patches:
    """The input of a convolution, whose product with a matrix is a convolution.

    Attributes:
      x: ``[..., *spatial, channels]``.
      convolve: ``convolve(x, matrix)``: the convolution with a kernel ``[window * channels, k]``,
        in the dtype of ``x``.
    """

    x: jax.Array
    convolve: Callable[[jax.Array, jax.Array], jax.Array]

    def __matmul__(self, matrix: jax.Array) -> jax.Array:
        return self.convolve(self.x, matrix.astype(self.x.dtype))

    def float32_product(self, matrix: jax.Array) -> jax.Array:
        """The convolution's output, converted: it is rounded to the dtype of the input."""
        return _to_float32(self @ matrix)

    def drop(self, key: jax.Array, rate: float) -> "Patches":
        """Inverted dropout of the convolution's input."""
        return Patches(_dropout(self.x, key, rate), self.convolve)

    def squared(self) -> "Patches":
        """Squares of the convolution's input."""
        return Patches(jnp.square(self.x.astype(jnp.float32)), self.convolve)


def _to_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))
