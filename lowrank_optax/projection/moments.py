"""The inner optimizer on one leaf alone, and where in its state the moments are."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.paths import leaves_by_path
from lowrank_optax.states.moment_names import FIRST_MOMENTS, SECOND_MOMENTS, field

# Names of arrays that a basis has no part in: the coefficients of Muon's iteration.
CONSTANTS = ("ns_coeffs",)
# Sizes of gradients that moments are looked at with: below any sensible threshold of clipping, and
# above it.
_SIZES, _LARGE = (2.0**-10, 2.0**-12), 2.0**10


def init_one(inner: optax.GradientTransformation, leaf: jax.Array, batch_ndim: int) -> Any:
    """The inner state of one leaf: every array has the leaf's batch axes first."""
    init = inner.init
    for _ in range(batch_ndim):
        init = jax.vmap(init)
    partition = explicit_sharding.partition_of(leaf)
    if partition is None or batch_ndim == 0:
        return init(leaf)

    def placed(x: jax.Array) -> jax.Array:  # what is not made of the leaf, as counts, is replicated
        own = explicit_sharding.partition_of(x) or (None,) * x.ndim
        target = PartitionSpec(*partition[:batch_ndim], *own[batch_ndim:])
        return explicit_sharding.constrain(x, target)

    return jax.tree.map(placed, init(leaf))


def update_one(
    inner: optax.GradientTransformationExtraArgs,
    gradient: jax.Array,
    state: Any,
    param: jax.Array | None,
    batch_ndim: int,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """The inner update of one leaf."""
    update = lambda g, s, p: inner.update(g, s, p, **extra_args)
    for _ in range(batch_ndim):
        update = jax.vmap(update)
    return update(gradient, state, param)


def moment_paths(state: Any, shape: tuple[int, ...], batch_ndim: int) -> dict[str, list[Any]]:
    """Where in a leaf's inner state its moments are: paths of the first and the second ones.

    Args:
      state: The inner state of one leaf, or its shapes.
      shape: Shape of the projected gradient.
      batch_ndim: Number of its batch axes.

    Raises:
      ValueError: If the state holds an array that depends on the basis in a way nobody told.
    """
    found: dict[str, list[Any]] = {"first": [], "second": []}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = field(path)
        kind = "first" if name in FIRST_MOMENTS else "second" if name in SECOND_MOMENTS else None
        if x.shape == shape and kind is not None:
            found[kind].append(path)
        elif name not in CONSTANTS and x.size > max(1, math.prod(x.shape[:batch_ndim])):
            raise ValueError(
                f"on_refresh cannot rotate the inner state's {jax.tree_util.keystr(path)} of shape "
                f"{x.shape}: it knows moments of the projected gradient's shape {shape} by the "
                f"names {', '.join(FIRST_MOMENTS + SECOND_MOMENTS)}. Take 'keep' or 'reset'."
            )
    return found


def at_path(tree: Any, path: Any) -> Any:
    """The leaf at a path of ``tree_leaves_with_path``."""
    return leaves_by_path(tree)[path]


class Average(NamedTuple):
    """How a moment averages gradients, or their squares: numbers, or arrays if they are traced.

    Attributes:
      decays: What is left of it after a gradient of zero, at the first three steps.
      sizes: What it is of a constant gradient, in units of that gradient's size (of its square),
        for a gradient of each of two sizes; one for an average of the gradients themselves.
      rounding: Relative error that rounding may give a size.
      alone: Whether other moments have no part in it.
      rest: What it is after a gradient of zero, if all moments were zero.
      large: Its size for a large gradient, which clipping makes smaller.
    """

    decays: tuple[Any, ...]
    sizes: tuple[Any, ...]
    rounding: Any
    alone: Any
    rest: Any
    large: Any

    @property
    def traced(self) -> bool:
        return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(self))

    @property
    def steady(self) -> bool:
        """Whether `correction` is right at all steps."""
        first, second, third = self.decays
        return bool(self.alone) and (first == 0 or second == third)

    def correction(self, count: jax.Array, dtype: Any) -> jax.Array:
        """The share ``1 - b**count`` of all gradients so far in the moment; one before the first.

        The first decay may be another: zero, of a moment that starts as its first gradient.
        """
        first, decay = (jnp.asarray(x, dtype) for x in self.decays[:2])
        steps = (count - 1).astype(dtype)  # outside of a jit each whole power is compiled
        return jnp.where(count == 0, 1, 1 - first * decay**steps)


def averages(inner: optax.GradientTransformationExtraArgs) -> dict[Any, Average]:
    """How moments average, by their paths in the state of one leaf.

    That is first moments, and second ones with a count beside them. Found by updates of a small
    matrix, outside of the program that is traced unless hyperparameters are traced. Decays are read
    from what is left of a moment after a gradient of zero: what stands before the moments, as
    clipping, changes gradients, not decays.
    """
    no_mesh = jax.sharding.AbstractMesh((), ())  # the caller's may have explicit axes
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(no_mesh):
        found = _looked_at(inner)
    return {
        path: average if average.traced else jax.tree.map(float, average)
        for path, average in found.items()
    }


def _looked_at(inner: optax.GradientTransformationExtraArgs) -> dict[Any, Average]:
    signs = jnp.array([[1.0, -1.0], [-1.0, 1.0]])  # of mean zero, in case means are removed
    zeros = jnp.zeros_like(signs)
    after = lambda gradient, state: leaves_by_path(inner.update(gradient, state, zeros)[1])
    states = [inner.init(zeros)]
    for _ in range(2):
        states.append(inner.update(zeros, states[-1], zeros)[1])
    orders = {}
    for path, x in jax.tree_util.tree_leaves_with_path(states[0]):
        order = 1 if field(path) in FIRST_MOMENTS else 2 if field(path) in SECOND_MOMENTS else 0
        counted = order == 1 or count_beside(states[0], path) is not None
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
        rest, *weights = [
            after(size * signs, only(states[-1], None))[path][0, 0] for size in (0, *_SIZES, _LARGE)
        ]
        given = (*_SIZES, _LARGE)
        *sizes, large = (
            x / y**order / (1 - decays[-1]) for x, y in zip(weights, given, strict=True)
        )
        # In bfloat16 a decay of 0.9 is 0.898, and the weight of a gradient 0.1 still.
        rounding = 4 * jnp.finfo(left[-1][path].dtype).eps / jnp.maximum(1 - decays[-1], 1e-6)
        exact = [jnp.where(jnp.abs(x - 1) < 1e-2, 1, x) for x in sizes]
        alone = functools.reduce(jnp.logical_and, apart, jnp.array(True))
        found[path] = Average(decays, tuple(exact), rounding, alone, rest, large)
    return found


def agree(x: float, y: float, rounding: float) -> bool:
    """Whether two sizes of averages are the same but for rounding, and for what ``eps`` adds."""
    return math.isfinite(y) and abs(x - y) <= (1e-2 + rounding) * abs(y)


def count_beside(state: Any, path: Any) -> Any:
    """The count of steps beside the moment at ``path``; None if there is none."""
    for other, x in jax.tree_util.tree_leaves_with_path(state):
        if other[:-1] == path[:-1] and field(other) in ("count", "step"):
            return x
    return None
