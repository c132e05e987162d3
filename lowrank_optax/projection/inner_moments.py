"""The inner optimizer on one leaf: its state, how its moments average, and how they are rotated."""

from collections.abc import Callable
import functools
import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.paths import leaves_by_path
from lowrank_optax.projection.view import View, over_batch
from lowrank_optax.states.moment_names import FIRST_MOMENTS, SECOND_MOMENTS, field

OnRefresh: TypeAlias = Literal["keep", "reset", "rotate", "rotate_moments"]

# Arrays that do not depend on the basis: the coefficients of Muon's iteration.
CONSTANTS = ("ns_coeffs",)
# Sizes of gradients by which moments are checked: two below any sensible threshold of clipping.
_SIZES = (2.0**-10, 2.0**-12, 2.0**10)


def init_one(inner: optax.GradientTransformation, leaf: jax.Array, batch_ndim: int) -> Any:
    """The inner state of one leaf: every array has the leaf's batch axes first."""
    init = over_batch(inner.init, batch_ndim)
    partition = explicit_sharding.partition_of(leaf)
    if partition is None or batch_ndim == 0:
        return init(leaf)

    def sharded(x: jax.Array) -> jax.Array:  # what is not made of the leaf, as counts, is not yet
        own = explicit_sharding.partition_of(x) or (None,) * x.ndim
        target = PartitionSpec(*partition[:batch_ndim], *own[batch_ndim:])
        return explicit_sharding.constrain(x, target)

    return jax.tree.map(sharded, init(leaf))


class Average(NamedTuple):
    """How a moment averages gradients or their squares: numbers, or arrays if they are traced.

    Attributes:
      decays: Share that is left of it after a gradient of zero, at the first three steps: ``b1`` or
        ``b2`` of Adam.
      sizes: Its value for a constant gradient, over that gradient (over its square), for gradients
        of two small sizes and a large one; one for an average of the gradients themselves.
      rounding: Relative error that rounding may give a size.
      alone: Whether it does not depend on other moments.
      offset: Its value after a gradient of zero, if all moments were zero.
    """

    decays: tuple[Any, ...]
    sizes: tuple[Any, ...]
    rounding: Any
    alone: Any
    offset: Any

    @property
    def traced(self) -> bool:
        return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(self))

    @property
    def steady(self) -> bool:
        """Whether `correction` is right at all steps."""
        first, second, third = self.decays
        return bool(self.alone) and (first == 0 or second == third)

    def correction(self, count: jax.Array, view: View) -> jax.Array:
        """The sum ``1 - b**count`` of the weights of all gradients so far, ``[*batch, 1, 1]``.

        One before the first gradient. The first decay may differ: it is zero for a moment that
        starts as its first gradient.
        """
        first, decay = (jnp.asarray(x, view.dtype) for x in self.decays[:2])
        steps = (count - 1).astype(view.dtype)  # outside of a jit each whole power is compiled
        return jnp.where(count == 0, 1, 1 - first * decay**steps)[..., None, None]


Averages: TypeAlias = dict[Any, Average]


def averages_of(
    inner: optax.GradientTransformationExtraArgs,
    on_refresh: OnRefresh,
    follows: bool,
    feeds_back: bool,
) -> Averages:
    """How the inner optimizer's moments average, by their paths in the state of one leaf.

    That is first moments, and second ones with a count beside them. Decays are read from the inner
    optimizer by updates with zero gradients, on which scaling and clipping before the moments have
    no effect; further updates check that moments are averages of gradients and of their squares.
    All run on a small matrix, outside of the program unless hyperparameters are traced.

    Raises:
      ValueError: If the subspace rule ``follows`` the momentum, the residual rule ``feeds_back``,
        or second moments are to be rotated, and moments are averages of another kind. (Not if
        decays are traced.)
    """
    if on_refresh != "rotate_moments" and not follows and not feeds_back:
        return {}
    no_mesh = jax.sharding.AbstractMesh((), ())  # the caller's may have explicit axes
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(no_mesh):
        found = _read_averages(inner)
    if is_traced(found):
        return found
    found = {path: jax.tree.map(float, average) for path, average in found.items()}
    for path, average in found.items():
        if field(path) not in FIRST_MOMENTS and on_refresh == "rotate_moments":
            _check_pair(found, path)
        elif field(path) in FIRST_MOMENTS and (follows or feeds_back):
            _check_first(path, average, follows)
    return found


def is_traced(averages: Averages) -> bool:
    """Whether hyperparameters of the inner optimizer are traced, so that nothing can be cached."""
    return any(average.traced for average in averages.values())


def _read_averages(inner: optax.GradientTransformationExtraArgs) -> Averages:
    signs = jnp.array([[1.0, -1.0], [-1.0, 1.0]])  # with mean zero, in case means are removed
    zeros = jnp.zeros_like(signs)
    after = lambda gradient, state: leaves_by_path(inner.update(gradient, state, zeros)[1])
    states = [inner.init(zeros)]
    for _ in range(2):
        states.append(inner.update(zeros, states[-1], zeros)[1])
    orders = {}
    for path, x in jax.tree_util.tree_leaves_with_path(states[0]):
        order = 1 if field(path) in FIRST_MOMENTS else 2 if field(path) in SECOND_MOMENTS else 0
        counted = order == 1 or _count_beside(states[0], path) is not None
        if order and counted and x.shape == zeros.shape:
            orders[path] = order

    def only(state: Any, one: Any) -> Any:
        """The state with ones as one of its moments, and zeros as the others."""
        value = lambda path, x: jnp.full_like(x, path == one) if path in orders else x
        return jax.tree_util.tree_map_with_path(value, state)

    found = {}
    for path, order in orders.items():
        left = [after(zeros, only(state, path)) for state in states]
        decays = tuple(x[path][0, 0].astype(signs.dtype) for x in left)
        apart = [jnp.abs(left[-1][other][0, 0]) < 1e-6 for other in orders if other != path]
        offset, *weights = [
            after(size * signs, only(states[-1], None))[path][0, 0] for size in (0, *_SIZES)
        ]
        sizes = [x / y**order / (1 - decays[-1]) for x, y in zip(weights, _SIZES, strict=True)]
        # In bfloat16 a decay of 0.9 is 0.898, and the weight of a gradient 0.1 still.
        rounding = 4 * jnp.finfo(left[-1][path].dtype).eps / jnp.maximum(1 - decays[-1], 1e-6)
        exact = tuple(jnp.where(jnp.abs(x - 1) < 1e-2, 1, x) for x in sizes)
        alone = functools.reduce(jnp.logical_and, apart, jnp.array(True))
        found[path] = Average(decays, exact, rounding, alone, offset)
    return found


def _agree(x: float, y: float, rounding: float) -> bool:
    """Whether two sizes of averages are equal up to rounding, and to what ``eps`` adds."""
    return math.isfinite(y) and abs(x - y) <= (1e-2 + rounding) * abs(y)


def _check_first(path: Any, average: Average, follows: bool) -> None:
    """Refuses a first moment that is no average of gradients in units that are known."""
    small, smaller, large = average.sizes
    in_units = average.steady and _agree(small, smaller, average.rounding)
    if in_units and _agree(large, small, average.rounding):
        return
    rule, does = ("subspace", "follows") if follows else ("residual", "feeds back")
    reason = _disturbance(average) or (
        "averages clipped gradients. Chain clipping before the whole optimizer"
        if in_units
        else "is no moving average of gradients in their own units, as that of optax.scale_by_adam"
    )
    raise ValueError(
        f"the {rule} rule {does} the momentum, but {jax.tree_util.keystr(path)} of the inner "
        f"optimizer {reason}. Take another {rule} rule otherwise."
    )


def _check_pair(found: Averages, path: Any) -> None:
    """Refuses a second moment that does not average the squares of what the first one averages."""
    beside = next((p for p in found if p[:-1] == path[:-1] and field(p) in FIRST_MOMENTS), None)
    if beside is None:  # then it is all variance
        return
    one, two = found[beside], found[path]
    rounding = one.rounding + two.rounding
    fits = [_agree(x**2, y, rounding) for x, y in zip(one.sizes[:2], two.sizes[:2], strict=True)]
    if not (all(fits) and one.steady and two.steady):
        first, second = (jax.tree_util.keystr(p) for p in (beside, path))
        raise ValueError(
            f"on_refresh='rotate_moments' needs the inner state's {second} to be an exponential "
            "moving average, with a constant decay, of the squares of the gradients that "
            f"{first} averages; it {_disturbance(one) or 'is not'}. Take 'rotate', 'keep' or "
            "'reset' otherwise."
        )


def _disturbance(average: Average) -> str | None:
    """Why a first moment does not average gradients, and what to do; None if nothing is known."""
    if average.offset != 0:
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


def first_moment_path(state: Any, view: View) -> Any:
    """Path of the first moment in the inner state of one leaf; None if there is none."""
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if x.shape == view.projected_shape and field(path) in FIRST_MOMENTS:
            return path
    return None


def _count_beside(state: Any, path: Any) -> Any:
    """The count of steps beside the moment at ``path``; None if there is none."""
    for other, x in jax.tree_util.tree_leaves_with_path(state):
        if other[:-1] == path[:-1] and field(other) in ("count", "step"):
            return x
    return None


class Moments(NamedTuple):
    """A leaf's first moment around a refresh, in the projected shape and the gradients' units.

    Attributes:
      before: First moment as the inner optimizer left it, in the last basis.
      after: First moment in the new basis.
      decay: Share that one step of the inner optimizer leaves of it, ``b1`` of Adam.
    """

    before: jax.Array
    after: jax.Array
    decay: jax.typing.ArrayLike

    @classmethod
    def around(cls, before: Any, after: Any, view: View, averages: Averages) -> "Moments | None":
        """From two inner states of one leaf; None if the inner optimizer has no first moment."""
        path = first_moment_path(before, view)
        if path is None:
            return None
        size = jnp.asarray(averages[path].sizes[0], view.dtype)
        one, other = (leaves_by_path(state)[path] / size for state in (before, after))
        return cls(one, other, averages[path].decays[-1])


def corrected_first_moment(
    state: Any, view: View, averages: Averages, steps: jax.Array
) -> jax.Array | None:
    """A leaf's first moment as an average of its gradients; None if there is none.

    ``steps`` is the number of steps so far, for a moment without a count beside it.
    """
    path = first_moment_path(state, view)
    if path is None:
        return None
    count = _count_beside(state, path)
    correction = averages[path].correction(steps if count is None else count, view)
    size = jnp.asarray(averages[path].sizes[0], view.dtype) * correction
    return leaves_by_path(state)[path] / size


def reset(
    inner: optax.GradientTransformationExtraArgs, state: Any, projected: jax.Array, view: View
) -> Any:
    """The inner state of one leaf before its first step, in the dtypes of ``state``."""
    new = init_one(inner, jnp.zeros_like(projected), len(view.batch))
    return jax.tree.map(lambda x, y: x.astype(y.dtype), new, state)


def rotated(
    state: Any, rotate: Callable[..., jax.Array], view: View, averages: Averages | None
) -> Any:
    """The inner state of one leaf with its moments in the new basis.

    First moments are rotated, ``M ← C M`` with ``C = newᵀ old``. Second ones too, if it is known
    how they average:

        V ← |(C∘C)(V' - M'²) + (C M')²|

    on bias-corrected moments, which treats ``V - M²`` as a variance of independent coordinates:
    unlike ``C V`` it can not be negative, and signs and order of the vectors do not matter.
    ``rotate(x)`` is ``C x``, and ``rotate(x, squared=True)`` is ``(C∘C) x``.

    Raises:
      ValueError: If the state holds an array that depends on the basis in an unknown way.

    Source: Robert et al., LDAdam, 2024, https://arxiv.org/abs/2410.16103, section 3.
    """
    moved, second_moments = {}, {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name, fits = field(path), x.shape == view.projected_shape
        if fits and name in FIRST_MOMENTS:
            moved[path] = rotate(x)
        elif fits and name in SECOND_MOMENTS:
            second_moments[path] = x
        elif name not in CONSTANTS and x.size > max(1, math.prod(x.shape[: len(view.batch)])):
            raise ValueError(
                f"on_refresh cannot rotate the inner state's {jax.tree_util.keystr(path)} of shape "
                f"{x.shape}: it knows moments of the projected gradient's shape "
                f"{view.projected_shape} by the names {', '.join(FIRST_MOMENTS + SECOND_MOMENTS)}. "
                "Take 'keep' or 'reset'."
            )
    firsts, leaves = list(moved), leaves_by_path(state)
    for path, second in second_moments.items():
        if averages is None:
            break
        first = next((p for p in firsts if p[:-1] == path[:-1]), None)
        if first is None:  # without a mean, all of it is variance
            moved[path] = jnp.abs(rotate(second, squared=True))
            continue
        count, one = _count_beside(state, path), jnp.ones((), view.dtype)
        correction, unbias = (
            one if count is None else averages[p].correction(count, view) for p in (path, first)
        )
        mean = leaves[first] / unbias
        variance = rotate(second / correction - mean**2, squared=True)
        moved[path] = correction * jnp.abs(variance + (moved[first] / unbias) ** 2)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: moved[path].astype(x.dtype) if path in moved else x, state
    )
