"""The inner optimizer on one leaf alone, and where in its state the moments are."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from lowrank_optax.matrices import explicit_sharding
from lowrank_optax.matrices.paths import leaves_by_path
from lowrank_optax.states.moments import FIRST_MOMENTS, SECOND_MOMENTS, field

# Names of arrays that a basis has no part in: the coefficients of Muon's iteration.
CONSTANTS = ("ns_coeffs",)


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


def sibling(tree: Any, path: Any, names: tuple[str, ...]) -> Any:
    """The leaf beside that at ``path`` with one of these names; None if there is none."""
    for other, x in jax.tree_util.tree_leaves_with_path(tree):
        if other[:-1] == path[:-1] and field(other) in names:
            return x
    return None


def decay_weights(inner: optax.GradientTransformationExtraArgs) -> Any:
    """What a first gradient of one contributes to each moment: ``1 - b`` of an exponential average.

    Found by an update with a gradient of one, so that bias corrections are the inner optimizer's
    own, whatever it is and however its rates are given.
    """
    one = jnp.ones((1, 1))
    state = inner.update(one, inner.init(one), one)[1]
    return jax.tree.map(lambda x: x.reshape(-1)[0] if x.size else x, state)
