"""DoRA: trained lengths for the columns of a weight, whose directions LoRA rotates."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.base import AdapterParams, Arrays, Axes, Weights, product
from lowrank_optax.adapters.low_rank import thin_product, to_float32
from lowrank_optax.adapters.methods.lora import LoRA
from lowrank_optax.adapters.operands import Operand


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    r"""LoRA with a trained length for each column: :math:`y = x V \,\mathrm{diag}(m / n) + b`.

    .. math::
      V = W + s A B, \qquad n_j = \lVert V_{:,j} \rVert, \qquad m = n \text{ at the start}.

    Beside LoRA's ``A`` and ``B`` it trains ``magnitude [L, d_out]``, the lengths ``m``, one for
    each output (PEFT's ``lora_magnitude_vector``). The bias is not scaled. The norms ``n`` are
    constants for the gradient (the paper's section 4.3), and found without ``V``:

    .. math::
      n_j^2 = \lVert W_{:,j} \rVert^2 + 2 s \, (A^\top W)_{:,j} \cdot B_{:,j}
              + s^2 \, B_{:,j}^\top A^\top\! A \, B_{:,j}.

    The first term is stored, ``norm_squared [L, d_out]``; the others are ``r`` rows of products.
    With dropout, the rescaling also uses the dropped input, as in PEFT, which costs one more
    product of ``x`` and ``W``. A column whose ``V`` is zero is not rescaled, so that it can grow.

    Options are those of `LoRA`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> method = lro.adapters.DoRA(rank=1, alpha=2)
      >>> weights = jnp.array([[[3.0, 0.0], [4.0, 2.0]]])
      >>> params = method.init(jax.random.key(0), weights)
      >>> print(params.trainable["magnitude"])
      [[5. 2.]]
      >>> p = method.layer_arrays(params, 0) | {"magnitude": jnp.array([10.0, 1.0])}
      >>> print(weights[0] + method.delta(p, weights[0]))
      [[6. 0.]
       [8. 1.]]

    Reference:
      Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024,
      https://arxiv.org/abs/2402.09353, equations 5 and 11.
    """

    axes: ClassVar[Axes] = {**LoRA.axes, "magnitude": ("out",), "norm_squared": ("out",)}

    @property
    def reads_weights(self) -> bool:
        """Lengths start at those of the weight's columns."""
        return True

    def init_layers(
        self, key: jax.Array, weights: Weights, shared: Arrays, *, embedding: bool = False
    ) -> AdapterParams:
        """LoRA's factors, and the lengths of the weight's columns."""
        if isinstance(weights, jax.ShapeDtypeStruct):
            raise TypeError("DoRA starts from the weights' columns: it needs them, not a shape.")
        lora = super().init_layers(key, weights, shared, embedding=embedding)
        squared = _column_squares(weights)
        magnitude = jnp.sqrt(squared).astype(self.param_dtype)
        return AdapterParams(
            lora.trainable | {"magnitude": magnitude}, lora.frozen | {"norm_squared": squared}
        )

    def branch(
        self,
        p: Arrays,
        x: Operand,
        *,
        y: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """``(g - 1) (y - b) + (x A) (g s B)`` with ``g = m / n``; see `Adapter.branch`."""
        first, second = self.factors(p)
        gain = self._gain(p, weight)
        if key is not None and self.dropout > 0:
            x = self.dropped(x, key)
            base = x @ weight
        else:
            base = y if bias is None else y - _per_column(bias, gain.shape).astype(y.dtype)
        rescaled = _per_column(gain - 1, gain.shape).astype(y.dtype) * base.astype(y.dtype)
        rotated = thin_product(x, first, gain[..., None, :] * second)
        return rescaled + rotated.astype(y.dtype)

    def delta(self, p: Arrays, weight: jax.Array) -> jax.Array:
        """``V diag(m / n) - W``; see `Adapter.delta`."""
        gain = self._gain(p, weight)[..., None, :]
        # At gain 1 nothing is lost to the rounding of W.
        return (gain - 1) * weight.astype(jnp.float32) + gain * product(*self.factors(p))

    def unmerged(self, p: Arrays, merged: jax.Array) -> jax.Array:
        """The weight before `merged`, from the directions and the stored lengths of its columns.

        With ``u`` the direction of the merged column, the length of ``W = n u - s A B`` gives ``n``
        by a quadratic equation; its larger root is right unless the adapter has rotated the column
        by more than a right angle. A column of magnitude zero is lost: NaN.
        """
        change = product(*self.factors(p))
        (magnitude,), squared = to_float32(p, "magnitude"), p["norm_squared"][..., None, :]
        direction = merged.astype(jnp.float32) / magnitude[..., None, :]
        dot = lambda a, b: jnp.sum(a * b, axis=-2, keepdims=True)
        along = dot(direction, change)
        # The direction of a rounded weight is not quite of length one.
        length = dot(direction, direction)
        inside = jnp.square(along) - length * (dot(change, change) - squared)
        norm = (along + jnp.sqrt(jnp.maximum(inside, 0))) / jnp.where(length == 0, 1, length)
        return jnp.where(squared == 0, 0, norm * direction - change).astype(merged.dtype)

    def to_lora(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """Refused: rescaling the columns of a weight is a change of full rank."""
        del p
        raise TypeError(
            "DoRA rescales the columns of the weight, which is not a change of low rank: merge it, "
            "or fit a LoRA to its `delta`."
        )

    def _gain(self, p: Arrays, weight: jax.Array) -> jax.Array:
        """``m / n`` ``[..., d_out]``, float32; ``n`` is a constant."""
        (magnitude,) = to_float32(p, "magnitude")
        first, second = (jax.lax.stop_gradient(f.astype(jnp.float32)) for f in self.factors(p))
        # In the weight's dtype, so that it is not copied in float32; products are summed in that.
        cross = jnp.matmul(
            first.mT.astype(weight.dtype),
            jax.lax.stop_gradient(weight),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        square = jnp.sum(second * product(product(first.mT, first), second), axis=-2)
        start = p["norm_squared"]
        # Of a column that the change has all but cancelled, only rounding errors are left.
        floor = jnp.finfo(jnp.float32).eps * (start + square)
        squared = jnp.maximum(start + 2 * jnp.sum(second * cross, axis=-2) + square, floor)
        norm = jnp.sqrt(jax.lax.stop_gradient(squared))
        return jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 1.0)


@jax.jit
def _column_squares(weights: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(weights.astype(jnp.float32)), axis=-2)


def _per_column(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each column, ``[*batch, d_out]``, beside rows ``[*batch, n, d_out]``."""
    x = x.reshape(shape) if x.size > shape[-1] else x
    return x if x.ndim == 1 else x[..., None, :]
