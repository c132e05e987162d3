"""One leaf's part of a projected update: its basis before the inner update, its result after it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import from_matrix, to_matrix
from lowrank_optax.projection import transfer
from lowrank_optax.projection.refresh import Energies, RefreshRule
from lowrank_optax.projection.residuals import Residual, Step
from lowrank_optax.projection.subspaces import Subspace
from lowrank_optax.projection.subspaces.base import select
from lowrank_optax.projection.view import LeafView, View, zeros_per_matrix


class Parts(NamedTuple):
    """What a projected optimizer is made of; `averages` is known only while it runs."""

    inner: optax.GradientTransformationExtraArgs
    subspace: Subspace
    residual: Residual
    refresh: RefreshRule
    on_refresh: transfer.OnRefresh
    scale: Any
    averages: Any = None

    def with_averages(self) -> "Parts":
        """With how moments average, as in `transfer.averages_of`."""
        needs = self.subspace.follow_momentum, self.residual.needs_moments
        return self._replace(averages=transfer.averages_of(self.inner, self.on_refresh, *needs))

    @property
    def each_alone(self) -> bool:
        """Whether the inner optimizer is run on each leaf alone."""
        return (
            self.on_refresh != "keep"
            or self.subspace.follow_momentum
            or self.residual.needs_moments
        )


class LeafState(NamedTuple):
    """What is kept for a matrix leaf besides its inner state."""

    basis: Any
    next_refresh: Any
    statistics: Any
    residual: Any


class Prepared(NamedTuple):
    """A matrix leaf before its basis is looked at.

    Attributes:
      matrix: The gradient with what the residual rule added, ``[*batch, m, n]``; None if it arrived
        projected.
      leaf: The gradient as it arrived.
      state: What is kept for the leaf.
      inner: Its own inner state; None if the inner optimizer runs on the whole tree.
      leaf_view: How it is projected.
    """

    matrix: jax.Array | None
    leaf: jax.Array
    state: LeafState
    inner: Any
    leaf_view: LeafView

    @property
    def view(self) -> View:
        return self.leaf_view.view


class Advanced(NamedTuple):
    """A matrix leaf ready for the inner update."""

    state: LeafState
    inner: Any
    matrix: jax.Array | None
    projected: jax.Array
    last_basis: Any
    leaf_view: LeafView
    refreshed: jax.Array
    moments: transfer.Moments | None


def init_leaf(parts: Parts, view: View, phase: float) -> LeafState:
    """The state before the first gradient; ``phase`` is the leaf's place among all, below 1."""
    if parts.subspace.shared:
        due = jnp.zeros((), jnp.int32)
    else:
        due = zeros_per_matrix(view, jnp.int32) + parts.refresh.first_due(phase)
    return LeafState(
        parts.subspace.init(view), due, parts.refresh.init(view), parts.residual.init(view)
    )


def prepare_leaf(
    parts: Parts,
    leaf: jax.Array,
    like: Any,
    leaf_view: LeafView,
    state: LeafState,
    inner: Any,
) -> Prepared:
    """The leaf as a batch of matrices, with what the residual rule adds to it.

    A leaf that has the projected shape already (as a layer gives it that projects in its backward
    pass) is taken as it is. Its basis, though due, then waits for the next whole gradient.
    """
    spec, view = leaf_view.spec, leaf_view.view
    matrix = None
    if leaf.shape == like.shape:
        matrix = to_matrix(leaf, spec)
        if parts.residual.before is not None:
            matrix = parts.residual.before(state.residual, matrix)
    else:
        _check_projected(parts, leaf, view)
    return Prepared(matrix, leaf, state, inner, leaf_view)


def project_leaf(parts: Parts, prepared: Prepared, state: LeafState, inner: Any) -> Advanced:
    """The leaf with its basis as it is to be used, and its inner state moved along."""
    matrix, view, last = prepared.matrix, prepared.view, prepared.state
    if matrix is None:
        projected = prepared.leaf.astype(view.dtype)
    else:
        projected = parts.subspace.project(state.basis, matrix, view)
    moments = None
    if parts.residual.needs_moments:
        moments = transfer.Moments.around(prepared.inner, inner, view, parts.averages)
    refreshed = state.next_refresh != last.next_refresh
    return Advanced(
        state=state,
        inner=inner,
        matrix=matrix,
        projected=projected,
        last_basis=last.basis,
        leaf_view=prepared.leaf_view,
        refreshed=refreshed,
        moments=moments,
    )


def finish_leaf(
    parts: Parts,
    advanced: Advanced,
    answer: jax.Array,
    like: Any,
    dtype: Any,
    count: jax.Array,
) -> tuple[jax.Array, LeafState]:
    """The leaf's update, of the shape of ``like``, and its new state."""
    spec, view = advanced.leaf_view.spec, advanced.leaf_view.view
    state, matrix, projected = advanced.state, advanced.matrix, advanced.projected
    step = Step(
        matrix=matrix,
        projected=projected,
        answer=answer.astype(view.dtype),
        scale=parts.scale,
        count=count,
        basis=state.basis,
        last_basis=advanced.last_basis,
        moments=advanced.moments,
        subspace=parts.subspace,
        view=view,
    )
    update, residual = parts.residual.update(state.residual, step)
    basis, due, statistics = state.basis, state.next_refresh, state.statistics
    if matrix is not None:
        if parts.refresh.observe is not None:
            squares = lambda x: jnp.sum(jnp.square(x.astype(view.dtype)), axis=(-2, -1))
            energies = Energies(squares(projected), squares(matrix))
            due, statistics = parts.refresh.observe(statistics, count, due, energies)
        if parts.subspace.track is not None:
            # A basis just found is the best for this gradient: what is left to follow is noise.
            tracked = parts.subspace.track(basis, matrix, projected, view)
            basis = select(~advanced.refreshed, tracked, basis)
    new = LeafState(basis, due, statistics, residual)
    return from_matrix(update.astype(dtype), spec, like), new


def _check_projected(parts: Parts, leaf: jax.Array, view: View) -> None:
    if leaf.shape != view.projected_shape:
        raise ValueError(
            f"the gradient of {view.path!r} has the shape {leaf.shape}: neither that of its "
            f"parameter nor {view.projected_shape}, that of its projection."
        )
    if parts.residual.needs_gradient:
        raise ValueError(
            f"the gradient of {view.path!r} arrived projected, as {leaf.shape}, but the residual "
            "rule needs it whole; take residual='drop'."
        )
