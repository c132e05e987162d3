"""SoRA's proximal step: gates are soft-thresholded after each update."""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import optax

from lowrank_optax.adapters.training.leaf_names import are_named, check_any_named
from lowrank_optax.states.arguments import transformation


class GateThresholdState(NamedTuple):
    """State of `soft_threshold_gates`.

    Attributes:
      count: Number of updates so far, int32.
      inner_state: State of the inner transformation.
    """

    count: Any
    inner_state: Any


def soft_threshold_gates(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    penalty: float,
    *,
    zero_below: bool = False,
    names: Sequence[str] = ("gate",),
) -> optax.GradientTransformationExtraArgs:
    r"""``inner``, with the leaves named ``gate`` soft-thresholded after its update.

    .. math::
      g_{t+1} = \mathrm{sign}(z) \max(|z| - \xi_t, 0), \qquad z = g_t + u_t, \quad
      \xi_t = \eta_t \lambda

    where :math:`u_t` is the update of ``inner``. With :math:`u_t = -\eta_t \nabla` that is a
    proximal gradient step on the loss plus :math:`\lambda \sum |g|`. Gates become exact zeros; a
    gate of zero is still trained, and returns when its update exceeds :math:`\xi_t`. This has to
    be the last step: nothing that changes the update of a gate can follow.

    Exclude gates from weight decay in ``inner``. Gradient clipping and Adam's moments are those of
    ``inner``. To count the gates that are left inside of the step, sum ``gate != 0``.

    Args:
      inner: Any optax transformation, with its learning rate.
      learning_rate: Learning rate :math:`\eta_t` of ``inner``, a number or the same schedule. For
        a constant threshold, as in the official code, give 1 here and the threshold as
        ``penalty``: gates then shrink on after the learning rate of ``inner`` has reached 0.
      penalty: Weight :math:`\lambda` of the absolute values.
      zero_below: Whether what is left below :math:`\xi_t` is set to zero too, as in the official
        code.
      names: Last names of the leaves to threshold.

    Returns:
      A transformation with the state `GateThresholdState`.

    Raises:
      TypeError: If ``inner`` is not an optax transformation.
      ValueError: If ``learning_rate`` or ``penalty`` is negative or not finite; in ``init``, if no
        leaf has one of the names; in ``update``, if it is not given the parameters.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = {"gate": jnp.array([0.05, 0.25, -0.15])}
      >>> tx = lro.adapters.soft_threshold_gates(optax.sgd(0.5), 0.5, penalty=0.2)
      >>> gradient = {"gate": jnp.array([0.0, 0.0, 0.1])}
      >>> updates, _ = tx.update(gradient, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["gate"])
      [ 0.    0.15 -0.1 ]

    Reference:
      Ding et al., Sparse Low-rank Adaptation of Pre-trained Language Models, 2023,
      https://arxiv.org/abs/2311.11696; ``zero_below`` is ``src/sparse_optimizer.py`` of
      https://github.com/TsinghuaC3I/SoRA.
    """
    inner = transformation("inner", inner)
    for name, value in (("learning_rate", learning_rate), ("penalty", penalty)):
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} must be finite and not negative.")
    if isinstance(names, str):
        raise ValueError(f"names={names!r} must be a sequence of names, for example ('gate',).")

    def init_fn(params: optax.Params) -> GateThresholdState:
        check_any_named(params, names, "attach lro.adapters.SoRA, or give `names`.")
        return GateThresholdState(jnp.zeros([], jnp.int32), inner.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, GateThresholdState]:
        if params is None:
            raise ValueError("soft_threshold_gates needs the parameters: update(u, state, params).")
        eta = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def step(is_gate: bool, update: jax.Array, gate: jax.Array) -> jax.Array:
            if not is_gate:
                return update
            old = gate.astype(jnp.float32)
            new = soft_threshold(old + update.astype(jnp.float32), eta * penalty, zero_below)
            # Exact zeros need the gate's own precision.
            return (new - old).astype(jnp.result_type(update, gate))

        new, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        new = jax.tree.map(step, are_named(new, names), new, params)
        return new, GateThresholdState(optax.safe_increment(state.count), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def soft_threshold(z: jax.Array, xi: ArrayLike, zero_below: bool = False) -> jax.Array:
    """``sign(z) max(|z| - xi, 0)``, the proximal operator of ``xi |z|``.

    Args:
      z: Any array.
      xi: The threshold, not negative.
      zero_below: Whether the official code's operator is computed instead: results below ``xi``
        become zero, and ``|z| = xi`` stays.
    """
    if zero_below:
        size = jnp.abs(z)
        z = jnp.where(size > xi, z - jnp.sign(z) * xi, z)
        return jnp.where(jnp.abs(z) < xi, 0, z)
    return jnp.sign(z) * jnp.maximum(jnp.abs(z) - xi, 0)
