"""A weight with its adapter, multiplied without forming their sum."""

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.base import Adapter
from lowrank_optax.adapters.operands import Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredWeight:
    r"""A weight with its adapter: :math:`x @ \mathrm{leaf} = x W + s\,(x A) B`.

    It stands where the weight stood, for functions that use it as ``x @ weight`` and in no other
    way: it is no array, so anything else (``weight + 1``, ``jnp.dot``) is a TypeError, not a dense
    matrix. It is a pytree whose arrays all have the weight's leading stack axes: ``jax.lax.scan``
    and ``jax.vmap`` cut it into layers, and ``leaf[i]`` is one of them.

    Attributes:
      weight: ``[..., d_in, d_out]``, or ``[..., d_out, d_in]`` if ``transposed``.
      arrays: The adapter's arrays, shared ones too.
      method: The adapter.
      transposed: Whether outputs come first: it is then used as ``x @ leaf.T``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> p = {"A": jnp.ones((2, 1)), "B": jnp.ones((1, 2))}
      >>> method = lro.adapters.LoRA(rank=1)
      >>> print(jnp.ones(2) @ lro.adapters.pytree.FactoredWeight(jnp.eye(2), p, method))
      [3. 3.]
    """

    weight: jax.Array
    arrays: dict[str, jax.Array]
    method: Adapter = dataclasses.field(metadata={"static": True})
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    # NumPy leaves the product to `__rmatmul__`.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return self.weight.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weight."""
        return self.weight.dtype

    @property
    def T(self) -> "FactoredWeight":
        """The transpose of a matrix that is not stacked."""
        if self.ndim != 2:
            raise TypeError(f".T of a weight of shape {self.shape}: it must be one matrix.")
        flipped = not self.transposed
        return FactoredWeight(self.weight.T, self.arrays, self.method, flipped)

    def __getitem__(self, layer: Any) -> "FactoredWeight":
        if self.ndim < 3:
            raise TypeError(f"a weight of shape {self.shape} with an adapter has no layers.")
        return jax.tree.map(lambda x: x[layer], self)

    def __iter__(self) -> Iterator["FactoredWeight"]:
        return (self[layer] for layer in range(self.shape[0]))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"a weight of shape {self.shape} with an adapter is no array: x @ weight is all it "
            "does. For other uses call `lro.adapters.pytree.effective`."
        )

    def __rmatmul__(self, x: Any) -> jax.Array:
        if self.transposed:
            raise TypeError(
                f"x @ weight with a weight of shape {self.shape} whose inputs come last: its "
                "adapter fits x @ weight.T."
            )
        x = jnp.asarray(x)
        stacked = self.ndim > 2
        if stacked and x.shape[:-2] != self.shape[:-2]:
            raise TypeError(
                f"x of shape {x.shape} @ stacked weights of shape {self.shape}: x must have the "
                "same leading axes, or the layers be taken one by one (jax.lax.scan)."
            )
        y = jnp.matmul(x, self.weight)
        inputs = Rows(x.astype(y.dtype))
        return y + self.method.branch(self.arrays, inputs, y=y, weight=self.weight).astype(y.dtype)
