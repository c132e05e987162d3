"""What is measured of weights and their final update: sums over leaves, and what follows."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from lowrank_optax.matrices.explicit_sharding import constrain, partition_of
from lowrank_optax.matrices.sums import summed_together
from lowrank_optax.schedules.weight_decay.equilibrium import Optimizer, equilibrium, momentum_of

MEASURED = (
    "weight_norm",
    "weight_rms",
    "update_rms",
    "relative_update",
    "rotation",
    "effective_learning_rate",
    "relative_learning_rate",
    "decay_share",
    "rounding_loss",
    "decay_lost",
    "equilibrium_norm",
    "equilibrium_rotation",
)
"""Names of the numbers of a group; see `monitor_weight_decay`."""

NONE = -1.0  # stands in the state for a number that there is not: all others are ≥ 0


def leaf_sums(weight: jax.Array, update: jax.Array, stacked: bool, decays: bool) -> jax.Array:
    """Six sums over a leaf, or over each layer of a stacked one, in float32: ``[layers, 6]``.

    ⟨w, w⟩, ⟨w, d⟩, ⟨d, d⟩; the number of elements whose update is lost, and their share of ⟨w, w⟩;
    ⟨w, w⟩ once more if the leaf decays. One read of weight and update.
    """
    w, d = weight.astype(jnp.float32), update.astype(jnp.float32)
    lost = is_lost(weight, update)
    squares = w * w
    products = (squares, w * d, d * d, lost.astype(jnp.int32), jnp.where(lost, squares, 0.0))
    stacked = stacked and w.ndim > 0
    first = int(stacked)
    if w.ndim > first:  # row by row: one long sum would lose what is small beside it
        products = summed_together(products, w.ndim - 1)
    sums = [jnp.sum(x, tuple(range(first, x.ndim)), dtype=jnp.float32) for x in products]
    decayed = sums[0] if decays else jnp.zeros_like(sums[0])
    return jnp.stack([_replicated(x) for x in (*sums, decayed)], -1).reshape(-1, 6)


def is_lost(weight: jax.Array, update: jax.Array) -> jax.Array:
    """Where an update that is not zero does not change the weight, rounded to its own dtype."""
    total = weight.astype(jnp.float32) + update.astype(jnp.float32)
    info = jnp.finfo(weight.dtype)
    if info.bits < 32:
        # Not a cast back and forth, which the compiler may leave out as excess precision.
        total = jax.lax.reduce_precision(total, info.nexp, info.nmant)
    return (total == weight.astype(jnp.float32)) & (update != 0)


def rotation_angle(ww: Any, wd: Any, dd: Any) -> jax.Array:
    r"""The angle in radians between :math:`w` and :math:`w + d`, from their products.

    :math:`\mathrm{atan2}\bigl(\sqrt{\lVert d \rVert^2 - p^2}, \lVert w \rVert + p\bigr)` with
    :math:`p = \langle w, d \rangle / \lVert w \rVert`, which float32 holds for updates of any size;
    the arccos of a cosine rounds angles below 3e-4 to zero. 0 where the weights are.

    Example:
      >>> import jax.numpy as jnp
      >>> w, d = jnp.array([1.0, 0.0]), jnp.array([0.0, 1e-5])
      >>> print(f"{rotation_angle(w @ w, w @ d, d @ d):.2e}")
      1.00e-05
    """
    norm = jnp.sqrt(ww)
    across = jnp.sqrt(jnp.maximum(dd - wd * ratio(wd, ww), 0.0))
    return jnp.where(ww == 0, 0.0, jnp.arctan2(across, norm + ratio(wd, norm)))


def measure(
    sums: jax.Array,
    sizes: np.ndarray,
    decaying: np.ndarray,
    learning_rate: jax.Array | None,
    weight_decay: jax.Array | None,
    optimizer: Optimizer,
    momentum: Any,
) -> dict[str, jax.Array]:
    """The numbers named in `MEASURED`, ``[groups]`` each, from sums ``[groups, 6]``.

    Args:
      sums: `leaf_sums`, added up.
      sizes: Elements of each group.
      decaying: Whether all of a group decays: only then is there an equilibrium.
      learning_rate: None if it is not known.
      weight_decay: None if it is not known.
      optimizer: As in `equilibrium`.
      momentum: As in `equilibrium`.
    """
    ww, wd, dd, lost, lost_ww, decayed_ww = sums.T
    size = jnp.asarray(sizes, jnp.float32)
    norm, update_norm = jnp.sqrt(ww), jnp.sqrt(dd)
    none = jnp.full_like(norm, NONE)
    numbers = dict.fromkeys(MEASURED, none) | {
        "weight_norm": norm,
        "weight_rms": norm / np.sqrt(np.maximum(sizes, 1)).astype(np.float32),
        "update_rms": update_norm / np.sqrt(np.maximum(sizes, 1)).astype(np.float32),
        "relative_update": ratio(update_norm, norm),
        "rotation": rotation_angle(ww, wd, dd),
        "rounding_loss": ratio(lost, size),
        "decay_lost": ratio(lost_ww, ww),
    }
    if learning_rate is None:
        return numbers
    numbers["effective_learning_rate"] = ratio(learning_rate, ww)
    numbers["relative_learning_rate"] = ratio(learning_rate, norm)
    if weight_decay is None:
        return numbers
    shrinkage = learning_rate * weight_decay
    numbers["decay_share"] = ratio(shrinkage * jnp.sqrt(decayed_ww), update_norm)
    momentum = momentum_of(optimizer, momentum)
    predicted = equilibrium(
        optimizer,
        learning_rate,
        weight_decay,
        momentum=momentum,
        size=size,
        unit_gradient_norm=_unit_gradient_norm(ww, wd, dd, learning_rate, momentum),
    )
    exists = jnp.asarray(decaying) & (shrinkage > 0)
    numbers["equilibrium_norm"] = jnp.where(exists, predicted.norm, NONE)
    numbers["equilibrium_rotation"] = jnp.where(exists, predicted.rotation, NONE)
    return numbers


def ratio(a: Any, b: jax.Array) -> jax.Array:
    """``a / b``, and 0 where ``b`` is; nan stays nan."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def _unit_gradient_norm(
    ww: jax.Array, wd: jax.Array, dd: jax.Array, rate: jax.Array, momentum: Any
) -> jax.Array:
    """‖g‖·‖w‖ of SGD, from the update across the weights: η times an average of gradients."""
    across = jnp.maximum(dd - wd * ratio(wd, ww), 0.0)
    return jnp.sqrt(across * (1 - momentum**2) * ww) / jnp.where(rate == 0, 1.0, rate)


def _replicated(x: jax.Array) -> jax.Array:
    """On a mesh of explicit axes whole on every device, as the state is."""
    return x if partition_of(x) is None else constrain(x, PartitionSpec(*[None] * x.ndim))
