"""Maestro's penalty as a proximal step after the update of an optimizer."""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import optax

from lowrank_optax.layers.maestro.ordered import prox_tails
from lowrank_optax.matrices.paths import is_whole, normalised_path

INWARD, OUTWARD = ("ordered_in", "kernel"), ("ordered_out", "kernel")
"""Names of the two factors, by which optimizers find them."""


class ProxState(NamedTuple):
    """State of `prox`.

    Attributes:
      count: Number of updates so far, int32.
    """

    count: Any


def prox(learning_rate: optax.ScalarOrSchedule, penalty: ArrayLike) -> optax.GradientTransformation:
    r"""Shrink the tails of Maestro layers by a proximal step; the last transformation of a chain.

    With the update :math:`u` of what comes before, a factor :math:`X` becomes
    :math:`\mathrm{prox}_{\eta \lambda}(X + u)` of the sum of its tails' norms, see `prox_tails`.
    This replaces the `penalty` in the loss: directions become exactly zero, and the weight
    :math:`\lambda` has the same meaning behind Adam as behind SGD. A direction that is zero in both
    factors stays so.

    Args:
      learning_rate: Learning rate :math:`\eta` of the optimizer before it, a number or the same
        schedule.
      penalty: Weight :math:`\lambda` of the penalty.

    Returns:
      A transformation with the state `ProxState`. It computes in float32 for narrower dtypes, and
      leaves other parameters alone. Nothing that changes an update may follow it. A step of it is
      a loop over the directions of a layer, on one number each.

    Raises:
      ValueError: If a number is negative or not finite; in ``init``, if no parameter is a factor of
        a Maestro layer, or one is without the other; in ``update``, without ``params``.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro, optax
      >>> model = nnx.Sequential(lro.layers.MaestroLinear(8, 16, rngs=nnx.Rngs(0)))
      >>> tx = optax.chain(optax.adam(1e-3), lro.layers.maestro.prox(1e-3, penalty=0.1))
      >>> state = tx.init(nnx.state(model, nnx.Param))

    Reference:
      Jenatton et al., Proximal Methods for Hierarchical Sparse Coding, 2011,
      https://arxiv.org/abs/1009.2139; the penalty is of https://arxiv.org/abs/2308.14929.
    """
    for name, value in (("learning_rate", learning_rate), ("penalty", penalty)):
        if isinstance(value, numbers.Real) and not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} must be finite and not negative.")

    def init_fn(params: optax.Params) -> ProxState:
        if is_whole(params) and not any(_stack_axes(params)):
            raise ValueError(
                "prox finds no factor of a Maestro layer (ordered_in/kernel): make MaestroLinear "
                "layers, or call maestro.convert(model)."
            )
        return ProxState(jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ProxState]:
        if params is None:
            raise ValueError("prox needs params: call tx.update(grads, state, params).")
        eta = learning_rate(state.count) if callable(learning_rate) else learning_rate
        threshold = eta * penalty
        leaves, treedef = jax.tree.flatten(params)
        new = []
        for axes, update, x in zip(
            _stack_axes(params), treedef.flatten_up_to(updates), leaves, strict=True
        ):
            new.append(update if axes is None else _step(axes, update, x, threshold))
        state = ProxState(optax.safe_increment(state.count))
        return treedef.unflatten(new), state

    return optax.GradientTransformation(init_fn, update_fn)


class _Axes(NamedTuple):
    stack: int
    """Number of stack axes, in front."""
    direction: int


def _stack_axes(params: optax.Params) -> list[_Axes | None]:
    """For each leaf that is a factor of a Maestro layer its axes; None for the others."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shapes = {normalised_path(path): jnp.shape(x) for path, x in leaves}
    found: list[_Axes | None] = []
    for names, shape in shapes.items():
        layer, kind = names[:-2], names[-2:]
        if kind not in (INWARD, OUTWARD):
            found.append(None)
            continue
        other = (*layer, *(OUTWARD if kind == INWARD else INWARD))
        if other not in shapes:
            raise ValueError(
                f"prox is given {'/'.join(names)} without {'/'.join(other)}: both factors of a "
                "layer must have the same mask or label."
            )
        # A convolution's first factor has more axes, and a stack may have any number.
        stack = len(shapes[*layer, *OUTWARD]) - 2
        found.append(_Axes(stack, len(shape) - 1 if kind == INWARD else len(shape) - 2))
    return found


def _step(axes: _Axes, update: jax.Array, x: jax.Array, threshold: ArrayLike) -> jax.Array:
    """The update with which the parameter becomes the proximal point of where it would be."""
    wide = jnp.promote_types(jnp.result_type(update, x), jnp.float32)
    old = x.astype(wide)
    columns = jnp.moveaxis(old + update.astype(wide), axes.direction, -1)
    flat = columns.reshape(*columns.shape[: axes.stack], -1, columns.shape[-1])
    new = prox_tails(flat, threshold).reshape(columns.shape)
    # Exact zeros need the parameter's own precision.
    return (jnp.moveaxis(new, -1, axes.direction) - old).astype(jnp.result_type(update, x))
