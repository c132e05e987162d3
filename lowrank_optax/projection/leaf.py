"""One leaf on its way through an update: basis, projection, and what is made of the answer.

The refresh of each leaf is a conditional of its own, and so is that of each slice of one that is
updated in slices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrices import from_matrix, to_matrix
from lowrank_optax.matrices.arithmetic import branch
from lowrank_optax.projection.inner_moments import (
    Moments,
    OnRefresh,
    averages_of,
    corrected_first_moment,
    reset,
    rotated,
)
from lowrank_optax.projection.refresh import Energies, RefreshRule
from lowrank_optax.projection.residuals.base import Residual, Step
from lowrank_optax.projection.subspaces.base import Subspace, all_finite, select
from lowrank_optax.projection.view import View, compute_dtype, zeros_per_matrix


class Parts(NamedTuple):
    """What a projected optimizer is made of; `averages` is known only while it runs."""

    inner: optax.GradientTransformationExtraArgs
    subspace: Subspace
    residual: Residual
    refresh: RefreshRule
    on_refresh: OnRefresh
    scale: Any
    averages: Any = None

    def with_averages(self) -> "Parts":
        """With how the inner optimizer's moments average, as `averages_of` says."""
        needs = self.subspace.follow_momentum, self.residual.needs_moments
        return self._replace(averages=averages_of(self.inner, self.on_refresh, *needs))

    @property
    def each_alone(self) -> bool:
        """Whether the inner optimizer runs on each leaf separately."""
        needs_moments = self.subspace.follow_momentum or self.residual.needs_moments
        return self.on_refresh != "keep" or needs_moments


class LeafState(NamedTuple):
    """State of a matrix leaf besides its inner state."""

    basis: Any
    next_refresh: Any
    statistics: Any
    residual: Any


class When(NamedTuple):
    """The step of an update: the number of optimizer steps before it, and its PRNG key."""

    count: jax.Array
    may_refresh: Any  # True, or a traced bool while gradients accumulate
    key: jax.Array


class Leaf(NamedTuple):
    """A leaf on its way through an update.

    Attributes:
      view: How it is projected; None if it is not a matrix.
      gradient: Gradient as it arrived.
      param: Array of the shape of the update.
      state: State of the leaf; None if it is not a matrix.
      inner: Inner state of the leaf; None if the inner optimizer runs on the whole tree.
      matrix: Gradient with what the residual rule added, ``[*batch, m, n]``; None if it arrived
        projected.
      projected: Gradient in the subspace, or just in the dtype of the arithmetic.
      last: The leaf before its refresh.
    """

    view: Any
    gradient: jax.Array
    param: Any
    state: Any
    inner: Any
    matrix: jax.Array | None = None
    projected: Any = None
    last: Any = None


def init_leaf(parts: Parts, view: View, phase: float) -> LeafState:
    """The state before the first gradient; ``phase`` is the leaf's position among all, below 1."""
    if parts.subspace.shared:
        first = jnp.zeros((), jnp.int32)
    else:
        first = zeros_per_matrix(view, jnp.int32) + parts.refresh.first_refresh(phase)
    return LeafState(
        parts.subspace.init(view), first, parts.refresh.init(view), parts.residual.init(view)
    )


def prepare(parts: Parts, leaf: Leaf) -> Leaf:
    """The leaf as a batch of matrices, with what the residual rule adds to it.

    A gradient may have the projected shape already, from a layer that projects in its backward
    pass. Its basis then waits for a refresh until the next whole gradient.
    """
    gradient, view = leaf.gradient, leaf.view
    to_compute_dtype = lambda: gradient.astype(compute_dtype(gradient.dtype))
    if view is None:
        return leaf._replace(state=None, projected=to_compute_dtype())
    if gradient.shape == leaf.param.shape:
        matrix = to_matrix(gradient, view.spec)
        if parts.residual.before is not None:
            matrix = parts.residual.before(leaf.state.residual, matrix)
        return leaf._replace(matrix=matrix)
    if gradient.shape != view.projected_shape:
        raise ValueError(
            f"the gradient of {view.path!r} has the shape {gradient.shape}: neither that of its "
            f"parameter nor {view.projected_shape}, that of its projection."
        )
    if parts.residual.needs_gradient:
        raise ValueError(
            f"the gradient of {view.path!r} arrived projected, as {gradient.shape}, but the "
            "residual rule needs it whole; take residual='drop'."
        )
    return leaf._replace(projected=to_compute_dtype())


def project_all(parts: Parts, leaves: Sequence[Leaf], when: When) -> list[Leaf]:
    """The prepared leaves in their bases, after the refresh of those that need one."""
    may_refresh = parts.subspace.refreshes or parts.on_refresh != "keep"
    if parts.subspace.shared:  # a gradient that arrived projected belongs to the basis so far
        may_refresh &= all(leaf.projected is None for leaf in leaves if leaf.view is not None)
    return [_project(parts, leaf, when, may_refresh) for leaf in leaves]


def _project(parts: Parts, leaf: Leaf, when: When, may_refresh: bool) -> Leaf:
    if leaf.matrix is None:
        return leaf._replace(last=leaf)
    state, inner = _refreshed(parts, leaf, when) if may_refresh else (leaf.state, leaf.inner)
    projected = parts.subspace.project(state.basis, leaf.matrix, leaf.view)
    return leaf._replace(state=state, inner=inner, projected=projected, last=leaf)


def projected_param(parts: Parts, leaf: Leaf) -> jax.Array:
    """The parameter as the inner optimizer gets it."""
    if leaf.view is None:
        return leaf.param
    matrix = to_matrix(leaf.param, leaf.view.spec)
    return parts.subspace.project(leaf.state.basis, matrix, leaf.view)


def _refreshed(parts: Parts, leaf: Leaf, when: When) -> tuple[LeafState, Any]:
    """The states of a leaf after a refresh, if it needs one."""
    matrix: Any = leaf.matrix
    hold = lambda: (leaf.state, leaf.inner)
    needed = (when.count >= leaf.state.next_refresh) & when.may_refresh
    if parts.subspace.shared:
        refresh = lambda: _refresh(parts, leaf, when, needed)
        # A new seed is cheaper than a branch.
        return refresh() if parts.on_refresh == "keep" else branch(needed, refresh, hold)

    def usable() -> jax.Array:
        finite = all_finite(matrix, matrix.ndim - 2) & jnp.any(matrix != 0, axis=(-2, -1))
        return needed & finite

    if parts.refresh.always and when.may_refresh is True:
        return _refresh(parts, leaf, when, usable())

    def refresh_usable() -> tuple[LeafState, Any]:
        # Two branches: the gradient is read only where a refresh is needed, and may be useless for
        # long, as the zero gradient of a frozen layer.
        able = usable()
        return branch(jnp.any(able), lambda: _refresh(parts, leaf, when, able), hold)

    return branch(jnp.any(needed), refresh_usable, hold)


def _refresh(parts: Parts, leaf: Leaf, when: When, able: jax.Array) -> tuple[LeafState, Any]:
    """The states with a new basis, for those of the batch that are ``able`` to find a good one."""
    view, state, inner, subspace = leaf.view, leaf.state, leaf.inner, parts.subspace
    if subspace.shared:
        new, chosen = subspace.refresh(when.key, None, state.basis, None, None), able
    else:
        momentum = None
        if subspace.follow_momentum:
            momentum = corrected_first_moment(inner, view, parts.averages, when.count)
        new = subspace.refresh(when.key, leaf.matrix, state.basis, momentum, view)
        chosen = able & all_finite(new, len(view.batch))
    basis = select(chosen, new, state.basis)
    overlap = None
    if parts.refresh.compares:  # the mean squared cosine of the principal angles
        eye = jnp.eye(view.rank, dtype=view.dtype)
        eye = jnp.broadcast_to(eye, (*view.batch, *eye.shape))
        small = view._replace(partition=view.small_partition)
        cosines = subspace.rotate(state.basis, basis, eye, small)
        overlap = jnp.sum(jnp.square(cosines), axis=(-2, -1)) / view.rank
    following, statistics = parts.refresh.schedule(
        state.statistics, when.count, state.next_refresh, overlap
    )
    if parts.on_refresh != "keep":
        if parts.on_refresh == "reset":
            zeros = subspace.project(basis, jnp.zeros(view.shape, view.dtype), view)
            moved = reset(parts.inner, inner, zeros, view)
        else:
            rotate = lambda x, squared=False: subspace.rotate(state.basis, basis, x, view, squared)
            averages = parts.averages if parts.on_refresh == "rotate_moments" else None
            moved = rotated(inner, rotate, view, averages)
        inner = select(jnp.broadcast_to(chosen, view.batch), moved, inner)
    new_state = LeafState(
        basis,
        jnp.where(chosen, following, state.next_refresh).astype(state.next_refresh.dtype),
        select(chosen, statistics, state.statistics),
        state.residual,
    )
    return new_state, inner


def refresh_without_leaves(
    parts: Parts, basis: Any, next_refresh: jax.Array, when: When
) -> LeafState:
    """What all leaves share after the refresh, where no leaf has it."""
    needed = (when.count >= next_refresh) & when.may_refresh
    new = parts.subspace.refresh(when.key, None, basis, None, None)
    following, _ = parts.refresh.schedule((), when.count, next_refresh, None)
    following = jnp.where(needed, following, next_refresh).astype(next_refresh.dtype)
    return LeafState(select(needed, new, basis), following, (), ())


def finish(
    parts: Parts, leaf: Leaf, answer: jax.Array, count: jax.Array
) -> tuple[jax.Array, LeafState | None]:
    """The leaf's update from the inner optimizer's answer, and its new state."""
    view, state, last, matrix = leaf.view, leaf.state, leaf.last, leaf.matrix
    if view is None:
        return answer.astype(leaf.gradient.dtype), None
    moments = None
    if parts.residual.needs_moments:
        moments = Moments.around(last.inner, leaf.inner, view, parts.averages)
    step = Step(
        matrix=matrix,
        projected=leaf.projected,
        answer=answer.astype(view.dtype),
        scale=parts.scale,
        count=count,
        basis=state.basis,
        last_basis=last.state.basis,
        moments=moments,
        subspace=parts.subspace,
        view=view,
    )
    update, residual = parts.residual.update(state.residual, step)
    basis, following, statistics = state.basis, state.next_refresh, state.statistics
    if matrix is not None and parts.refresh.observe is not None:
        squares = lambda x: jnp.sum(jnp.square(x.astype(view.dtype)), axis=(-2, -1))
        energies = Energies(squares(leaf.projected), squares(matrix))
        following, statistics = parts.refresh.observe(statistics, count, following, energies)
    if matrix is not None and parts.subspace.track is not None:
        # A basis just found is the best for this gradient: what is left to follow is noise.
        refreshed = state.next_refresh != last.state.next_refresh
        tracked = parts.subspace.track(basis, matrix, leaf.projected, view)
        basis = select(~refreshed, tracked, basis)
    update = from_matrix(update.astype(leaf.gradient.dtype), view.spec, leaf.param)
    return update, LeafState(basis, following, statistics, residual)
