"""What a residual rule is, and the rules that do not scale: drop, add, add signs, feed back."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.projection.inner_moments import Moments
from lowrank_optax.projection.subspaces.base import Subspace, all_finite, select
from lowrank_optax.projection.view import View


class Step(NamedTuple):
    """One step of one leaf, as a residual rule sees it.

    Attributes:
      matrix: Gradient with what the rule added to it, ``[*batch, m, n]``; None if it arrived
        projected.
      projected: Gradient in the subspace, ``R [*batch, r, n]`` or ``[*batch, m, r]``.
      answer: Update of the inner optimizer, ``N``, of the same shape.
      scale: Factor of the lifted updates.
      count: Number of updates before this one.
      basis: Basis of the subspace rule at this step.
      last_basis: Basis at the step before.
      moments: First moment before and after a refresh, in the gradients' units, and its decay; None
        unless the rule needs it.
      subspace: Subspace rule.
      view: How the leaf is projected.
    """

    matrix: jax.Array | None
    projected: jax.Array
    answer: jax.Array
    scale: Any
    count: jax.Array
    basis: Any
    last_basis: Any
    moments: Moments | None
    subspace: Subspace
    view: View

    def gradient(self) -> jax.Array:
        """The whole gradient in the dtype of the arithmetic, for rules that need it."""
        assert self.matrix is not None
        return self.matrix.astype(self.view.dtype)

    def lift(self, projected: jax.Array) -> jax.Array:
        return self.subspace.lift(self.basis, projected, self.view)


class Residual(NamedTuple):
    """What becomes of the part of a gradient outside the subspace.

    Attributes:
      update: ``update(state, step) -> (update, state)``: the whole update ``[*batch, m, n]`` of a
        leaf, the lifted part included.
      init: ``init(view) -> state``: a NamedTuple of arrays that have the batch axes first, or one
        such array, or ``()``.
      before: ``before(state, matrix) -> matrix``: changes a gradient before it is projected.
      needs_gradient: Whether the rule needs the whole gradient and not only its projection.
      needs_moments: Whether the rule needs the first moment around a refresh.
      needs_one_side: Whether the rule works on columns (or rows) and refuses ``side="both"``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> halved = lro.residuals.Residual(lambda state, step: (0.5 * step.matrix, state))
      >>> tx = lro.scale_by_projection(optax.identity(), lro.subspaces.svd(1), residual=halved)
      >>> gradient = {"kernel": jnp.ones((2, 3))}
      >>> tx.update(gradient, tx.init(gradient))[0]["kernel"][0].tolist()
      [0.5, 0.5, 0.5]

    Reference:
      Chen et al., Fira, 2024, https://arxiv.org/abs/2410.01623, section 4.
    """

    update: Callable[[Any, Step], tuple[jax.Array, Any]]
    init: Callable[[View], Any] = lambda view: ()
    before: Callable[[Any, jax.Array], jax.Array] | None = None
    needs_gradient: bool = True
    needs_moments: bool = False
    needs_one_side: bool = False


def drop() -> Residual:
    """Applies nothing outside the subspace: GaLore.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.scale_by_projection(
      ...     optax.identity(), lro.subspaces.fixed(jnp.eye(2, 1)), side="rows", residual="drop"
      ... )
      >>> gradient = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> tx.update(gradient, tx.init(gradient))[0]["kernel"].tolist()
      [[1.0, 2.0], [0.0, 0.0]]

    Reference:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, Algorithm 1.
    """
    return Residual(
        lambda state, step: (step.lift(step.scale * step.answer), state), needs_gradient=False
    )


def raw(factor: float = 1.0) -> Residual:
    """Adds the residual times ``factor``: plain gradient descent outside the subspace (SUMO).

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.scale_by_projection(
      ...     optax.identity(), lro.subspaces.fixed(jnp.eye(2, 1)), side="rows", residual="raw"
      ... )
      >>> gradient = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> tx.update(gradient, tx.init(gradient))[0]["kernel"].tolist()
      [[1.0, 2.0], [3.0, 4.0]]

    Reference:
      Refael et al., SUMO, 2025, https://arxiv.org/abs/2505.24749, Algorithm 1.
    """

    def update(state: object, step: Step) -> tuple[jax.Array, object]:
        inside = step.lift(step.scale * step.answer - factor * step.projected)
        return inside + factor * step.gradient(), state

    return Residual(update)


def sign(factor: float = 1.0) -> Residual:
    """Adds the signs of the residual times ``factor``: sign descent outside it (FRUGAL).

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.scale_by_projection(
      ...     optax.identity(), lro.subspaces.fixed(jnp.eye(2, 1)), side="rows", residual="sign"
      ... )
      >>> gradient = {"kernel": jnp.array([[1.0, 2.0], [3.0, -4.0]])}
      >>> tx.update(gradient, tx.init(gradient))[0]["kernel"].tolist()
      [[1.0, 2.0], [1.0, -1.0]]

    Reference:
      Zmushko et al., FRUGAL, 2024, https://arxiv.org/abs/2411.07837, Algorithm 1.
    """

    def update(state: object, step: Step) -> tuple[jax.Array, object]:
        outside = jnp.sign(step.gradient() - step.lift(step.projected))
        return step.lift(step.scale * step.answer) + factor * outside, state

    return Residual(update)


class QuantizedError(NamedTuple):
    """An error in 8 bits: ``low + step·codes`` with one ``low`` and ``step`` for each row.

    Attributes:
      codes: Codes ``[*batch, m, n]``, uint8.
      low: Least entry of each row, ``[*batch, m, 1]`` float32.
      step: Distance between codes in each row, ``[*batch, m, 1]`` float32.
    """

    codes: jax.Array
    low: jax.Array
    step: jax.Array


def error_feedback(bits: Literal[32, 8] = 32, momentum: bool = False) -> Residual:
    r"""Saves the error ``E ← G + E - P R`` and adds it to the next gradient.

    Nothing is lost, only late: the sum of all projections, plus the error, is the sum of all
    gradients. The error has the size of the weights: with 32 bits the state is as large as Adam's
    or larger. 8 bits are rounded for each row.

    Args:
      bits: 32, or 8: codes from 0 to 255 between the least and the largest entry of each row.
      momentum: Whether to save the part of the first moment that a refresh projects away too
        (LDAdam), :math:`\tfrac{b_1}{1 - b_1}(P_{t-1} M - P_t C M)`, with the inner optimizer's
        :math:`b_1`, and its first moment in the gradients' units.

    Raises:
      ValueError: If `bits` is neither 32 nor 8.
      TypeError: If `momentum` is not a bool.

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
    as_is = lambda x: x
    encode, decode = (_quantized, _dequantized) if bits == 8 else (as_is, as_is)

    def init(view: View) -> Any:
        return encode(explicit_sharding.zeros(view.shape, view.dtype, view.partition))

    def before(state: Any, matrix: jax.Array) -> jax.Array:
        error = decode(state)
        return matrix.astype(error.dtype) + error

    def update(state: Any, step: Step) -> tuple[jax.Array, Any]:
        assert step.matrix is not None
        sent, whole = step.projected, step.matrix
        if step.moments is not None and momentum:
            weight = step.moments.decay / (1 - step.moments.decay)
            last = step.subspace.lift(step.last_basis, step.moments.before, step.view)
            sent, whole = sent + weight * step.moments.after, whole + weight * last
        error = encode(whole - step.lift(sent))
        usable = all_finite(whole, len(step.view.batch))
        return step.lift(step.scale * step.answer), select(usable, error, state)

    return Residual(update, init, before, needs_moments=momentum)


def _quantized(x: jax.Array) -> QuantizedError:
    low, high = (f(x, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    step = (high - low) / 255
    codes = jnp.round((x - low) / jnp.where(step == 0, 1, step))
    low, step = low.astype(jnp.float32), step.astype(jnp.float32)
    return QuantizedError(codes.astype(jnp.uint8), low, step)


def _dequantized(error: QuantizedError) -> jax.Array:
    return error.low + error.step * error.codes.astype(error.step.dtype)
