"""What becomes of the inner optimizer's state when the basis turns: kept, reset, or rotated."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.projection import moments
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.view import View
from lowrank_optax.states.moments import FIRST_MOMENTS, field

OnRefresh: TypeAlias = Literal["keep", "reset", "rotate", "rotate_moments"]
CHOICES = ("keep", "reset", "rotate", "rotate_moments")

Turn: TypeAlias = Callable[..., jax.Array]


class Moments(NamedTuple):
    """A leaf's first moment around a refresh, in the projected shape.

    Attributes:
      before: As the inner optimizer left it, in the last basis.
      after: As it starts from, in the new one.
    """

    before: jax.Array
    after: jax.Array

    @classmethod
    def of(cls, before: jax.Array | None, after: jax.Array | None) -> "Moments | None":
        """None if the inner optimizer keeps no first moment."""
        return None if before is None or after is None else cls(before, after)


def transferred(
    on_refresh: OnRefresh,
    inner: optax.GradientTransformationExtraArgs,
    state: Any,
    subspace: base.Subspace,
    old: Any,
    new: Any,
    view: View,
) -> Any:
    """The inner state of one leaf after its basis turned from ``old`` to ``new``.

    ``"reset"`` starts anew, the count of steps included. ``"rotate"`` moves first moments to the
    new basis, ``M ← C M`` with ``C = newᵀ old``. ``"rotate_moments"`` also moves second moments,

        V ← |(C∘C)(V' - M'²) + (C M')²|

    on bias-corrected moments, which treats ``V - M²`` as a variance of independent coordinates:
    unlike ``C V`` it can not be negative, and signs and order of the vectors do not matter.

    Source: Robert et al., LDAdam, 2024, https://arxiv.org/abs/2410.16103, section 3.
    """
    batch_ndim = len(view.batch)
    if on_refresh == "keep":
        return state
    if on_refresh == "reset":
        zeros = jnp.zeros_like(subspace.project(new, jnp.zeros(view.shape, view.dtype), view))
        return jax.tree.map(
            lambda x, y: x.astype(y.dtype),
            moments.init_one(inner, zeros, batch_ndim),
            state,
        )
    turn = lambda x, squared=False: subspace.turn(old, new, x, view, squared)
    return _rotated(inner, state, turn, view, second=on_refresh == "rotate_moments")


def check_on_refresh(on_refresh: Any) -> None:
    """Refuses what is none of the choices."""
    if on_refresh not in CHOICES:
        raise ValueError(
            f"on_refresh={on_refresh!r} must be one of {', '.join(map(repr, CHOICES))}."
        )


def first_moment(state: Any, view: View) -> jax.Array | None:
    """A leaf's first moment as it stands; None if the inner optimizer keeps none."""
    paths = _first_paths(state, view)
    return moments.at_path(state, paths[0]) if paths else None


def corrected_first_moment(
    inner: optax.GradientTransformationExtraArgs, state: Any, view: View
) -> jax.Array | None:
    """A leaf's first moment without the bias of its start; None if the inner keeps none."""
    paths = _first_paths(state, view)
    if not paths:
        return None
    correction = _correction(inner, state, paths[0], view)
    return moments.at_path(state, paths[0]) / correction


def _first_paths(state: Any, view: View) -> list[Any]:
    return [
        path
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if x.shape == view.projected_shape and field(path) in FIRST_MOMENTS
    ]


def _rotated(
    inner: optax.GradientTransformationExtraArgs,
    state: Any,
    turn: Turn,
    view: View,
    second: bool,
) -> Any:
    paths = moments.moment_paths(state, view.projected_shape, len(view.batch))
    moved = {path: turn(moments.at_path(state, path)) for path in paths["first"]}
    if second:
        for path in paths["second"]:
            moved[path] = _turned_second_moment(inner, state, path, turn, view, moved)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: moved[path].astype(x.dtype) if path in moved else x, state
    )


def _turned_second_moment(
    inner: optax.GradientTransformationExtraArgs,
    state: Any,
    path: Any,
    turn: Turn,
    view: View,
    moved: dict[Any, jax.Array],
) -> jax.Array:
    second = moments.at_path(state, path)
    correction = _correction(inner, state, path, view)
    second = second / correction
    beside = [p for p in moved if p[:-1] == path[:-1]]
    if not beside:  # no mean is kept: all of it is variance
        return correction * jnp.abs(turn(second, squared=True))
    unbias = _correction(inner, state, beside[0], view)
    mean = moments.at_path(state, beside[0]) / unbias
    variance = turn(second - mean**2, squared=True)
    return correction * jnp.abs(variance + (moved[beside[0]] / unbias) ** 2)


def _correction(
    inner: optax.GradientTransformationExtraArgs, state: Any, path: Any, view: View
) -> jax.Array:
    """``1 - b**count`` of a moment, ``[*batch, 1, 1]``; one where there is no count beside it."""
    count = moments.sibling(state, path, ("count", "step"))
    if count is None:
        return jnp.ones((), view.dtype)
    weight = moments.at_path(moments.decay_weights(inner), path)
    bias = 1 - (1 - weight.astype(view.dtype)) ** count
    return jnp.where(bias == 0, 1, bias)[..., None, None]
