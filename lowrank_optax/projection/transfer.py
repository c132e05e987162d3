"""What becomes of the inner optimizer's state when the basis turns: kept, reset, or rotated."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.projection import moments
from lowrank_optax.projection.subspaces import base
from lowrank_optax.projection.view import View
from lowrank_optax.states.moment_names import FIRST_MOMENTS, field

OnRefresh: TypeAlias = Literal["keep", "reset", "rotate", "rotate_moments"]
CHOICES = ("keep", "reset", "rotate", "rotate_moments")

Turn: TypeAlias = Callable[..., jax.Array]
Averages: TypeAlias = dict[Any, moments.Average]


class Moments(NamedTuple):
    """A leaf's first moment around a refresh, in the projected shape and the gradients' units.

    Attributes:
      before: As the inner optimizer left it, in the last basis.
      after: As it starts from, in the new one.
      decay: What one step of the inner optimizer leaves of it, ``b1`` of Adam.
    """

    before: jax.Array
    after: jax.Array
    decay: jax.typing.ArrayLike

    @classmethod
    def around(cls, before: Any, after: Any, view: View, averages: Averages) -> "Moments | None":
        """From two inner states of one leaf; None if the inner optimizer keeps no first moment."""
        path = next(iter(_first_paths(before, view)), None)
        if path is None:
            return None
        average = averages[path]
        size = jnp.asarray(average.sizes[0], view.dtype)
        one, other = (moments.at_path(state, path) / size for state in (before, after))
        return cls(one, other, average.decays[-1])


def transferred(
    on_refresh: OnRefresh,
    inner: optax.GradientTransformationExtraArgs,
    state: Any,
    subspace: base.Subspace,
    old: Any,
    new: Any,
    view: View,
    averages: Averages,
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
    return _rotated(state, turn, view, averages if on_refresh == "rotate_moments" else None)


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
    state: Any, view: View, averages: Averages, steps: jax.Array
) -> jax.Array | None:
    """A leaf's first moment as an average of its gradients; None if the inner keeps none.

    ``steps`` is the number of steps so far, for a moment without a count beside it.
    """
    path = next(iter(_first_paths(state, view)), None)
    if path is None:
        return None
    average, count = averages[path], moments.count_beside(state, path)
    correction = average.correction(steps if count is None else count, view.dtype)
    size = jnp.asarray(average.sizes[0], view.dtype) * correction[..., None, None]
    return moments.at_path(state, path) / size


def averages_of(
    inner: optax.GradientTransformationExtraArgs,
    on_refresh: OnRefresh,
    follows: bool,
    feeds_back: bool,
) -> Averages:
    """How the inner optimizer's moments average, where a refresh needs to know.

    Args:
      inner: The inner optimizer.
      on_refresh: What becomes of its state.
      follows: Whether the subspace rule follows the momentum.
      feeds_back: Whether the residual rule needs the momentum.

    Raises:
      ValueError: If moments are averages of another kind. (Not where decays are traced.)
    """
    if on_refresh != "rotate_moments" and not follows and not feeds_back:
        return {}
    found = moments.averages(inner)
    if is_traced(found):
        return found
    for path, average in found.items():
        if field(path) not in FIRST_MOMENTS and on_refresh == "rotate_moments":
            _check_pair(found, path)
        elif field(path) in FIRST_MOMENTS and (follows or feeds_back):
            _check_first(path, average, follows)
    return found


def is_traced(averages: Averages) -> bool:
    """Whether hyperparameters of the inner optimizer are traced, so that nothing can be kept."""
    return any(average.traced for average in averages.values())


def _check_first(path: Any, average: moments.Average, follows: bool) -> None:
    """Refuses a first moment that is no average of gradients in units that are known."""
    in_units = moments.agree(*average.sizes, rounding=average.rounding)
    is_clipped = not moments.agree(average.large, average.sizes[0], rounding=average.rounding)
    if average.steady and in_units and not is_clipped:
        return
    rule, does = ("subspace", "follows") if follows else ("residual", "feeds back")
    clipped = "averages clipped gradients. Chain clipping before the whole optimizer"
    reason = _disturbance(average) or (
        clipped
        if average.steady and in_units
        else "is no moving average of gradients in their own units, as that of optax.scale_by_adam"
    )
    raise ValueError(
        f"the {rule} rule {does} the momentum, but {jax.tree_util.keystr(path)} of the inner "
        f"optimizer {reason}. Take another {rule} rule otherwise."
    )


def _disturbance(average: moments.Average) -> str | None:
    """What keeps a first moment from averaging gradients, and what to do; None if nothing."""
    if average.rest != 0:
        return (
            "changes at a gradient of zero, as with noise that optax.add_noise adds to gradients. "
            "Chain that before the whole optimizer"
        )
    if 1 in average.decays[1:]:  # ADOPT leaves out the first step alone
        return (
            "is not updated at every step, as in optax.MultiSteps. Put that around the whole "
            "optimizer"
        )
    return None


def _check_pair(found: Averages, path: Any) -> None:
    """Refuses a second moment that is no average of the squares that the first is a mean of."""
    beside = next(
        (p for p in found if p[:-1] == path[:-1] and field(p) in FIRST_MOMENTS and p != path), None
    )
    if beside is None:  # then it only turns, as it is
        return
    one, two = found[beside], found[path]
    room = one.rounding + two.rounding
    fits = [moments.agree(x**2, y, room) for x, y in zip(one.sizes, two.sizes, strict=True)]
    if not (all(fits) and one.steady and two.steady):
        first, second = (jax.tree_util.keystr(p) for p in (beside, path))
        needs = f"on_refresh='rotate_moments' needs the inner state's {second} to be"
        reason = _disturbance(one)
        raise ValueError(
            f"{needs} an exponential moving average, with a constant decay, of the squares of the "
            f"gradients that {first} averages; it {reason or 'is not'}. Take 'rotate', "
            "'keep' or 'reset' otherwise."
        )


def _first_paths(state: Any, view: View) -> list[Any]:
    return [
        path
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if x.shape == view.projected_shape and field(path) in FIRST_MOMENTS
    ]


def _rotated(state: Any, turn: Turn, view: View, averages: Averages | None) -> Any:
    """Moments in the new basis, second ones only if it is known how they average."""
    paths = moments.moment_paths(state, view.projected_shape, len(view.batch))
    moved = {path: turn(moments.at_path(state, path)) for path in paths["first"]}
    if averages is not None:
        for path in paths["second"]:
            moved[path] = _turned_second_moment(state, path, turn, view, moved, averages)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: moved[path].astype(x.dtype) if path in moved else x, state
    )


def _turned_second_moment(
    state: Any,
    path: Any,
    turn: Turn,
    view: View,
    moved: dict[Any, jax.Array],
    averages: Averages,
) -> jax.Array:
    second = moments.at_path(state, path)
    beside = [p for p in moved if p[:-1] == path[:-1]]
    if not beside:  # no mean is kept: all of it is variance
        return jnp.abs(turn(second, squared=True))
    correction, unbias = (_correction(averages, state, p, view) for p in (path, beside[0]))
    mean = moments.at_path(state, beside[0]) / unbias
    variance = turn(second / correction - mean**2, squared=True)
    return correction * jnp.abs(variance + (moved[beside[0]] / unbias) ** 2)


def _correction(averages: Averages, state: Any, path: Any, view: View) -> jax.Array:
    """``1 - b**count`` of a moment, ``[*batch, 1, 1]``; one where there is no count beside it."""
    count = moments.count_beside(state, path)
    if count is None:
        return jnp.ones((), view.dtype)
    return averages[path].correction(count, view.dtype)[..., None, None]
