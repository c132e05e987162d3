"""Both axes compressed: a basis for the rows, and one for the columns."""

from typing import Any, NamedTuple

import jax

from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.view import View


class TwoBases(NamedTuple):
    """The basis of `both_sides`: what the rule keeps for the rows, and for the columns."""

    rows: Any
    columns: Any


def both_sides(rule: base.Subspace) -> base.Subspace:
    """``rule`` on the rows and on the columns: ``R = Pᵀ G Q``, ``[*batch, r, r]``.

    `scale_by_projection` applies it for ``side="both"``.

    Args:
      rule: Any subspace rule but those that follow the momentum.

    Raises:
      ValueError: If the rule follows the momentum.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, numpy as np, optax
      >>> tx = lro.scale_by_projection(optax.identity(), lro.subspaces.svd(2), side="both")
      >>> gradient = {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
      >>> updates, _ = tx.update(gradient, tx.init(gradient))
      >>> print(np.diag(updates["kernel"]).round(3) + 0)
      [3. 2. 0.]

    Reference:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, equation 2; ``full`` in the
      official code.
    """
    if rule.follow_momentum:
        raise ValueError("side='both' cannot be combined with a rule that follows the momentum.")

    def refresh(key: jax.Array, matrix: Any, last: Any, momentum: Any, view: Any) -> TwoBases:
        keys = jax.random.split(key)
        last = TwoBases(None, None) if last is None else last
        views = (None, None) if view is None else (_rows(view), _columns(view))
        rows = rule.refresh(keys[0], matrix, last.rows, momentum, views[0])
        columns = rule.refresh(keys[1], matrix, last.columns, momentum, views[1])
        return TwoBases(rows, columns)

    def project(bases: TwoBases, matrix: jax.Array, view: View) -> jax.Array:
        half = rule.project(bases.rows, matrix, _rows(view))
        return rule.project(bases.columns, half, _columns_of_half(view))

    def lift(bases: TwoBases, projected: jax.Array, view: View) -> jax.Array:
        half = rule.lift(bases.columns, projected, _columns_of_half(view))
        return rule.lift(bases.rows, half, _rows(view))

    def turn(
        old: TwoBases, new: TwoBases, projected: jax.Array, view: View, squared: bool = False
    ) -> jax.Array:
        partition = view.small_partition
        for side, at in ((0, _rows(view)), (1, _columns(view))):
            inner = at._replace(partition=partition)
            projected = rule.turn(old[side], new[side], projected, inner, squared)
        return projected

    def track(bases: TwoBases, matrix: jax.Array, projected: jax.Array, view: View) -> TwoBases:
        del projected
        move = rule.track
        assert move is not None
        parts = ((bases.rows, _rows(view)), (bases.columns, _columns(view)))
        return TwoBases(*(move(b, matrix, rule.project(b, matrix, v), v) for b, v in parts))

    return rule._replace(
        init=lambda view: TwoBases(rule.init(_rows(view)), rule.init(_columns(view))),
        refresh=refresh,
        project=project,
        lift=lift,
        turn=turn,
        track=None if rule.track is None else track,
        kept=TwoBases(rule.kept, rule.kept),
        size=None,
    )


def _rows(view: View) -> View:
    return view._replace(axis=-2, both=False)


def _columns(view: View) -> View:
    return view._replace(axis=-1, both=False)


def _columns_of_half(view: View) -> View:
    """The columns of a matrix whose rows are compressed already."""
    rows = _rows(view)
    return rows._replace(axis=-1, shape=rows.projected_shape, partition=rows.projected_partition)
