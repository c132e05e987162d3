"""What a residual rule is: how an update is made of the part inside the subspace and the rest."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lowrank_optax.projection.subspaces import Subspace
from lowrank_optax.projection.transfer import Moments
from lowrank_optax.projection.view import View


class Step(NamedTuple):
    """One step of one leaf, as a residual rule sees it.

    Attributes:
      matrix: The gradient (with what the rule added to it) ``[*batch, m, n]``; None if it arrived
        projected.
      projected: It in the subspace, ``R [*batch, r, n]`` or ``[*batch, m, r]``.
      answer: What the inner optimizer made of it, ``N``, of the same shape.
      scale: Factor of the lifted updates.
      count: Number of updates before this one.
      basis: The subspace rule's basis at this step.
      last_basis: That of the step before.
      moments: The first moment before and after a refresh, in the gradients' units, and its decay;
        None unless the rule asks for it.
      subspace: The subspace rule.
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
        """The whole gradient, in the dtype of the arithmetic; for rules that need it."""
        assert self.matrix is not None
        return self.matrix.astype(self.view.dtype)

    def lift(self, projected: jax.Array) -> jax.Array:
        """From the subspace to the matrix."""
        return self.subspace.lift(self.basis, projected, self.view)


class Residual(NamedTuple):
    """What becomes of the part of a gradient outside the subspace.

    Attributes:
      update: ``update(state, step) -> (update, state)``: the whole update ``[*batch, m, n]`` of a
        leaf, the lifted part included.
      init: ``init(view) -> state``: a NamedTuple of arrays that have the batch axes first, or one
        such array, or ``()``.
      before: ``before(state, matrix) -> matrix``: what is added to a gradient before it is
        projected; None for nothing.
      needs_gradient: Whether the whole gradient is needed, not its projection alone.
      needs_moments: Whether the first moment around a refresh is needed.
      needs_one_side: Whether it works on columns (or rows), so that ``side="both"`` is refused.

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
