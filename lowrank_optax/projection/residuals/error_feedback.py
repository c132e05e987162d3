"""Error feedback: what a step could not send is added to the next gradient."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.projection.residuals.base import Residual, Step
from lowrank_optax.projection.subspaces.base import all_finite, select
from lowrank_optax.projection.view import View


class QuantizedError(NamedTuple):
    """An error in 8 bits: ``low + step·codes`` with one ``low`` and ``step`` for each row.

    Attributes:
      codes: ``[*batch, m, n]`` uint8.
      low: ``[*batch, m, 1]`` float32, the least entry of each row.
      step: ``[*batch, m, 1]`` float32.
    """

    codes: jax.Array
    low: jax.Array
    step: jax.Array


def error_feedback(bits: Literal[32, 8] = 32, momentum: bool = False) -> Residual:
    r"""Error feedback: ``E ← G + E - P R`` is kept and added to the next gradient.

    Nothing is lost, only late: the sum of all that was projected, plus the error, is the sum of all
    gradients. The error has the size of the weights: with 32 bits the state is as large as Adam's
    or larger, so 8 bits are there, rounded for each row.

    Args:
      bits: 32, or 8: codes from 0 to 255 between the least and the largest entry of each row.
      momentum: LDAdam's generalization: the part of the first moment that a refresh projects away
        is kept too, :math:`\tfrac{b_1}{1 - b_1}(P_{t-1} M - P_t C M)`, with the inner optimizer's
        :math:`b_1`, and its first moment in the gradients' units.

    Raises:
      ValueError: If ``bits`` is neither.
      TypeError: If ``momentum`` is not a bool.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.scale_by_projection(
      ...     optax.identity(),
      ...     lro.subspaces.fixed(jnp.eye(2, 1)),
      ...     side="rows",
      ...     residual=lro.residuals.error_feedback(),
      ... )
      >>> gradient = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> tx.update(gradient, tx.init(gradient))[1].residual["kernel"].tolist()
      [[0.0, 0.0], [3.0, 4.0]]

    References:
      Modoranu et al., 2025, https://arxiv.org/abs/2505.17967, Algorithm 1. Robert et al., LDAdam,
      2024, https://arxiv.org/abs/2410.16103, Algorithm 1.
    """
    if bits not in (8, 32):
        raise ValueError(f"bits={bits!r} must be 32 or 8.")
    if not isinstance(momentum, bool):
        raise TypeError(f"momentum={momentum!r} must be a bool: b1 is read from inner.")
    encode, decode = (_quantized, _dequantized) if bits == 8 else (_as_is, _as_is)

    def init(view: View) -> Any:
        return encode(explicit_sharding.zeros(view.shape, view.dtype, view.partition))

    def before(state: Any, matrix: jax.Array) -> jax.Array:
        error = decode(state)
        return matrix.astype(error.dtype) + error

    def update(state: Any, step: Step) -> tuple[jax.Array, Any]:
        assert step.matrix is not None
        sent, kept = step.projected, step.matrix
        if step.moments is not None and momentum:
            weight = step.moments.decay / (1 - step.moments.decay)
            last = step.subspace.lift(step.last_basis, step.moments.before, step.view)
            sent, kept = sent + weight * step.moments.after, kept + weight * last
        error = encode(kept - step.lift(sent))
        usable = all_finite(kept, len(step.view.batch))
        return step.lift(step.scale * step.answer), select(usable, error, state)

    return Residual(update, init, before, needs_moments=momentum)


def _as_is(x: jax.Array) -> jax.Array:
    return x


def _quantized(x: jax.Array) -> QuantizedError:
    low, high = (f(x, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    step = (high - low) / 255
    codes = jnp.round((x - low) / jnp.where(step == 0, 1, step))
    narrow = lambda array: array.astype(jnp.float32)
    return QuantizedError(codes.astype(jnp.uint8), narrow(low), narrow(step))


def _dequantized(error: QuantizedError) -> jax.Array:
    return error.low + error.step * error.codes.astype(error.step.dtype)
